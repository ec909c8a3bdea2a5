"""Labelling state of a request across engine steps (chunked prefill of long prompts)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from labeler.teachers.audits import audited_labels
from labeler.teachers.draw_uniforms import row_uniforms
from labeler.teachers.vllm.label_requests import AUDIT_RATE, ROW_KEY, SPANS
from labeler.teachers.vllm.packed_labels import Packed, empty_packed
from schemas.record.spans import span_targets
from schemas.spec import RecordSpec


@dataclass(frozen=True)
class RequestState:
    """A request that is being labelled; after preemption it is relabelled from its start.

    Attributes:
        targets: int64 [N], target indices, rising.
        uniforms: float64 [N, numbers per position], for the draws; None for kinds without draws.
        is_audited: bool [N].
        packed: labels of N positions, then their audits; filled chunk by chunk.
    """

    targets: np.ndarray
    uniforms: np.ndarray | None
    is_audited: np.ndarray
    packed: Packed

    @staticmethod
    def create(
        arguments: dict[str, Any],
        record: RecordSpec,
        vocab_size: int,
        device: torch.device | None = None,
    ) -> "RequestState":
        """A state without labels yet.

        Args:
            arguments: the ``extra_args`` of ``label_params``.
            record: what to keep.
            vocab_size: V.
            device: where the labels are collected; None: the host.
        """
        targets = span_targets(np.asarray(arguments[SPANS]))
        row_key = bytes.fromhex(arguments[ROW_KEY])
        audited = audited_labels(row_key, len(targets), arguments[AUDIT_RATE])
        is_audited = np.zeros(len(targets), bool)
        is_audited[audited] = True
        return RequestState(
            targets=targets,
            uniforms=row_uniforms(record, row_key, targets),
            is_audited=is_audited,
            packed=empty_packed(len(targets) + len(audited), record, vocab_size, device),
        )

    def chunk(self, start: int, end: int, query_start: int) -> "Chunk | None":
        """Returns the part of the request that a step labels; None if it has no target.

        Args:
            start, end: positions [start, end) of the prompt that the step computed.
            query_start: row of position ``start`` in the hidden states of the step.
        """
        # The hidden state at position t - 1 gives the distribution over the token at t.
        first, last = np.searchsorted(self.targets, (start + 1, end + 1))
        return Chunk(self, int(first), int(last), query_start - start) if last > first else None


@dataclass(frozen=True)
class Chunk:
    """The labels [first, last) of a request, which one step of the engine computes.

    Attributes:
        state: of the request.
        first, last: half-open range among its N targets.
        row_offset: row in the hidden states of the step, less the position in the prompt.
    """

    state: RequestState
    first: int
    last: int
    row_offset: int

    @property
    def targets(self) -> np.ndarray:
        """int64 [last - first], target indices."""
        return self.state.targets[self.first : self.last]

    @property
    def hidden_rows(self) -> np.ndarray:
        """int64 [last - first], rows of the step's hidden states that give the labels."""
        return self.targets - 1 + self.row_offset

    def store_audits(self, columns: torch.Tensor) -> int:
        """Stores this chunk's audits, the first rows of float32 [A, K + 2]; returns how many."""
        flags = self.state.is_audited
        start, end = (len(flags) + int(flags[:at].sum()) for at in (self.first, self.last))
        self.state.packed.floats[start:end, : columns.shape[1]] = columns[: end - start]
        return end - start


def gather(chunks: Sequence[Chunk], name: str) -> np.ndarray:
    """Concatenates an array of the requests' states over their chunks."""
    parts = [getattr(chunk.state, name)[chunk.first : chunk.last] for chunk in chunks]
    return np.concatenate(parts)


def scatter(packed: Packed, audits: torch.Tensor | None, chunks: Sequence[Chunk]) -> None:
    """Copies the labels and audits of a step into the states of its requests."""
    start = audit_start = 0
    for chunk in chunks:
        end = start + chunk.last - chunk.first
        for mine, new in zip(chunk.state.packed, packed, strict=True):
            mine[chunk.first : chunk.last] = new[start:end]
        start = end
        if audits is not None:
            audit_start += chunk.store_audits(audits[audit_start:])
