"""Labels of positions in the three arrays that vLLM's engine carries home from its workers."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from labeler.label_head.position_labels import PositionLabels
from labeler.teachers.audits import audit_of
from labeler.teachers.protocol import RowLabels
from schemas.spec import RecordSpec


class Packed(NamedTuple):
    """Labels of N positions, and behind them the audits of A of these.

    An audit has the columns of ``labeler.label_head.audit_logits`` in its floats and nothing else.

    Attributes:
        integers: int32 [N, K + 2, or 2 K + 2]: ids, the two lengths, and for kind ``sampled`` the
            counts.
        floats: float32 [N, K + 2 or more]: log-probabilities, tail mass, target, entropy if the
            record has it, one for each of its temperatures.
        ranks: int32 [N].
    """

    integers: torch.Tensor
    floats: torch.Tensor
    ranks: torch.Tensor


def empty_packed(
    count: int, record: RecordSpec, vocab_size: int, device: torch.device | None = None
) -> Packed:
    """Memory for the labels of ``count`` positions, on the host or a device."""
    width = record.most_entries(vocab_size)
    return Packed(
        torch.empty(count, _num_integers(record, width), dtype=torch.int32, device=device),
        torch.empty(count, width + _num_extra(record), device=device),
        torch.empty(count, dtype=torch.int32, device=device),
    )


def _num_extra(record: RecordSpec) -> int:
    """Columns of floats beside the entries: tail mass, target, entropy if any, the temperatures."""
    return 2 + int(record.entropy) + len(record.temperatures)


def _num_integers(record: RecordSpec, width: int) -> int:
    """Columns of integers: the ids, the two lengths, and the counts if there are any."""
    return (2 * width if record.kind == "sampled" else width) + 2


def pack(labels: PositionLabels) -> Packed:
    """Labels as three arrays; ``unpack`` is the way back."""
    ids = [labels.entry_ids, labels.head_len[:, None], labels.tail_len[:, None]]
    if labels.entry_counts is not None:
        ids.append(labels.entry_counts.int())
    floats = [labels.entry_logprobs, labels.tail_logmass[:, None], labels.target_logprob[:, None]]
    if labels.entropy is not None:
        floats.append(labels.entropy[:, None])
    if labels.lse is not None:
        floats.append(labels.lse)
    return Packed(torch.cat(ids, dim=1), torch.cat(floats, dim=1), labels.target_rank)


def unpack(packed: Packed, record: RecordSpec, audited: npt.NDArray[np.int64]) -> RowLabels:
    """The labels that were packed, as views of the arrays; copies where most slots are empty.

    Args:
        packed: of N positions and A audits.
        record: of the labels.
        audited: int64 [A], the labels that were audited.
    """
    count = len(packed.ranks) - len(audited)
    width = packed.floats.shape[1] - _num_extra(record)
    integers, values = np.asarray(packed.integers)[:count], np.asarray(packed.floats)[:count]
    head_len, tail_len = integers[:, width], integers[:, width + 1]
    used = int((head_len + tail_len).max(initial=0))
    # With a small tau, all labels of a unit would take a hundred times what is in them.
    entries = slice(width if 2 * used > width else used)
    extra = values[:, width:]
    lse_at = 2 + int(record.entropy)
    columns: tuple[Any, ...] = (
        integers[:, entries],
        values[:, entries],
        head_len,
        tail_len,
        integers[:, width + 2 :][:, entries] if record.kind == "sampled" else None,
        extra[:, 0],
        extra[:, 1],
        np.asarray(packed.ranks)[:count],
        extra[:, 2] if record.entropy else None,
        extra[:, lse_at:] if record.temperatures else None,
    )
    audit = np.asarray(packed.floats)[count:, : width + 2].copy()
    if 2 * used <= width:
        columns = tuple(None if column is None else column.copy() for column in columns)
    columns += (audit_of(audited, audit) if len(audited) else None,)
    return RowLabels(*columns)
