"""Rows that an engine is working on: it may take several steps over one, and many rows in one."""

from dataclasses import dataclass

import numpy as np
import torch

from labeler.teachers.audits import audited_labels
from labeler.teachers.request_checks import row_uniforms
from labeler.teachers.vllm.packed_labels import Packed, empty_packed
from schemas.spec import RecordSpec


@dataclass
class RequestState:
    """A request that is being labelled; a long one takes several steps, and may be restarted.

    Attributes:
        targets: int64 [N], target indices, rising.
        target_ids: int64 [N], the tokens that stand there; None where the engine has them.
        uniforms: float64 [N, numbers of a position], of the draws; None where there are none.
        is_audited: bool [N].
        packed: of N positions and their audits.
    """

    targets: np.ndarray
    target_ids: np.ndarray | None
    uniforms: np.ndarray | None
    is_audited: np.ndarray
    packed: Packed

    @staticmethod
    def of(
        token_ids: np.ndarray | None,
        targets: np.ndarray,
        row_key: bytes,
        audit_rate: float,
        record: RecordSpec,
        vocab_size: int,
        device: torch.device | None = None,
    ) -> "RequestState":
        """A row of which nothing is labelled yet; its labels will be on the device, unset: host."""
        audited = audited_labels(row_key, len(targets), audit_rate)
        is_audited = np.zeros(len(targets), bool)
        is_audited[audited] = True
        return RequestState(
            targets=targets,
            target_ids=None if token_ids is None else token_ids[targets],
            uniforms=row_uniforms(record, row_key, targets),
            is_audited=is_audited,
            packed=empty_packed(len(targets) + len(audited), record, vocab_size, device),
        )


@dataclass(frozen=True)
class Chunk:
    """The positions of one request that one step labels: [first, last) of its N targets."""

    row: RequestState
    first: int
    last: int

    @property
    def audits(self) -> slice:
        """Where the audits of these positions are among those of the row."""
        flags = self.row.is_audited
        return slice(int(flags[: self.first].sum()), int(flags[: self.last].sum()))


def joined(shares: list[Chunk], name: str) -> np.ndarray:
    """What the shares have of an array of their rows, one after the other."""
    return np.concatenate([getattr(share.row, name)[share.first : share.last] for share in shares])


def deal(packed: Packed, shares: list[Chunk]) -> None:
    """Copies the labels of a step into the rows that they belong to."""
    start = 0
    for share in shares:
        end = start + share.last - share.first
        for mine, new in zip(share.row.packed, packed, strict=True):
            mine[share.first : share.last] = new[start:end]
        start = end


def deal_audits(columns: torch.Tensor, shares: list[Chunk]) -> None:
    """Copies the audits of a step, float32 [audits, K + 2], into the rows that they belong to."""
    start = 0
    for share in shares:
        place, count = share.audits, len(share.row.targets)
        end = start + place.stop - place.start
        mine = share.row.packed.floats[count + place.start : count + place.stop]
        mine[:, : columns.shape[1]] = columns[start:end]
        start = end
