"""Labels one engine step: hidden states to logits to labels."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from labeler.label_head.audit_logits import audit_logits
from labeler.label_head.position_labels import PositionLabels, label_logits
from labeler.label_head.thread_pool import SlicePool
from labeler.teachers.vllm.packed_labels import Packed, pack
from labeler.teachers.vllm.worker.request_state import Chunk, RequestState, gather, scatter
from labeler.teachers.vllm.worker.tensor_parallel import VocabParallelLogits
from schemas.spec import RecordSpec

# Logits in memory at once: enough rows for an efficient product with the head at any vocabulary
# size, few enough to stay in the cache of a CPU if the vocabulary is small.
_MIN_ROWS = 256
_LOGIT_ELEMENTS = 2**22


def rows_at_once(vocab_size: int) -> int:
    """Number of positions whose logits [rows, V] are in memory at once."""
    return max(_MIN_ROWS, _LOGIT_ELEMENTS // vocab_size)


class StepLabeler:
    """Labels the steps of one worker; common to both model runners."""

    def __init__(
        self,
        record: RecordSpec,
        vocab_size: int,
        device: torch.device,
        parallel: VocabParallelLogits | None,
    ) -> None:
        """
        Args:
            record: what to keep; may be replaced between steps.
            vocab_size: V.
            device: device of the logits.
            parallel: logits divided among workers by vocabulary; None: not divided.
        """
        self.record = record
        self._vocab_size = vocab_size
        self._parallel = parallel
        self._pool = SlicePool(device)

    def new_state(
        self, arguments: dict[str, Any], device: torch.device | None = None
    ) -> RequestState:
        """The state of a request with these ``extra_args``; labels go to the device or host."""
        return RequestState.create(arguments, self.record, self._vocab_size, device)

    def label(
        self,
        compute_logits: Callable[[torch.Tensor], torch.Tensor | None],
        hidden_states: torch.Tensor,
        target_ids: torch.Tensor,
        chunks: Sequence[Chunk],
    ) -> None:
        """Labels the chunks of a step and stores the labels in the states of their requests.

        Args:
            compute_logits: logits [rows, V] of hidden states; None in a worker that gets none.
            hidden_states: [tokens of the step, H].
            target_ids: integer [T], of the chunks one after the other.
            chunks: T positions in all; at least one.
        """
        device = hidden_states.device
        rows = np.concatenate([chunk.hidden_rows for chunk in chunks])
        hidden_rows, target_ids = torch.from_numpy(rows).to(device), target_ids.to(device)
        uniforms = gather(chunks, "uniforms") if self.record.has_draws else None
        audited = gather(chunks, "is_audited")
        step = rows_at_once(self._vocab_size)
        packed: list[Packed] = []
        audits: list[torch.Tensor] = []
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            found = self.label_positions(
                compute_logits,
                hidden_states[hidden_rows[part]],
                target_ids[part],
                None if uniforms is None else uniforms[part],
                audited[part],
            )
            if found is not None:
                packed.append(found[0])
                audits += [] if found[1] is None else [found[1]]
        if packed:
            home = chunks[0].state.packed.ranks.device
            joined = Packed(*(torch.cat(part).to(home) for part in zip(*packed, strict=True)))
            scatter(joined, torch.cat(audits).to(home) if audits else None, chunks)

    def label_positions(
        self,
        compute_logits: Callable[[torch.Tensor], torch.Tensor | None],
        hidden: torch.Tensor,
        target_ids: torch.Tensor,
        uniforms: np.ndarray | None,
        audited: np.ndarray,
    ) -> tuple[Packed, torch.Tensor | None] | None:
        """Labels T positions, together with the other workers if logits are vocabulary-parallel.

        Args:
            compute_logits: see ``label``.
            hidden: [T, H].
            target_ids: integer [T].
            uniforms: float64 [T, numbers per position]; None for kinds without draws.
            audited: bool [T].

        Returns:
            The labels, and the audits in order, None if nothing is audited. None in a worker that
            gets no logits.
        """
        if self._parallel is None:
            logits, mine = compute_logits(hidden), slice(None)
        else:
            logits, mine = self._parallel.exchange(hidden, self._vocab_size)
        if logits is None:
            return None  # gathered logits may go to one worker of a tensor-parallel group only
        numbers = None if uniforms is None else uniforms[mine]
        labels = label_logits(logits, target_ids[mine], self.record, numbers, self._pool)
        packed, audits = pack(labels, self.record), None
        if audited.any():
            at = torch.from_numpy(np.flatnonzero(audited[mine])).to(logits.device)
            audits = audit_rows(logits, labels, at, self._pool)
        if self._parallel is None:
            return packed, audits
        return self._parallel.gather(packed, audits, audited)


def audit_rows(
    logits: torch.Tensor, labels: PositionLabels, at: torch.Tensor, pool: SlicePool
) -> torch.Tensor:
    """Audits of the rows ``at``, int64 [A], of logits [T, V]; see ``audit_logits``."""

    def audit(part: slice, _: object) -> torch.Tensor:
        rows = at[part]
        return audit_logits(logits[rows], labels.entry_ids[rows], labels.head_len[rows])

    step = max(1, -(-len(at) // pool.num_threads))
    parts = [slice(first, first + step) for first in range(0, max(len(at), 1), step)]
    return torch.cat(pool.map(audit, parts))
