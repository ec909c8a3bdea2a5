"""Labels of positions in the three arrays that vLLM's engine carries home from its workers."""

from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import torch

from labeler.label_head import PositionLabels
from labeler.teachers.base import RowLabels
from schemas.spec import RecordSpec


class Packed(NamedTuple):
    """Labels of N positions.

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


def empty_packed(count: int, record: RecordSpec, vocab_size: int) -> Packed:
    """Memory on the host for the labels of ``count`` positions."""
    width = record.most_entries(vocab_size)
    return Packed(
        torch.empty(count, _num_integers(record, width), dtype=torch.int32),
        torch.empty(count, width + _num_extra(record)),
        torch.empty(count, dtype=torch.int32),
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


def unpack(packed: Packed, record: RecordSpec) -> RowLabels:
    """The labels that were packed, as views of the arrays; copies where most slots are empty."""
    integers, values = np.asarray(packed.integers), np.asarray(packed.floats)
    width = values.shape[1] - _num_extra(record)
    head_len, tail_len = integers[:, width], integers[:, width + 1]
    used = int((head_len + tail_len).max(initial=0))
    # With a small tau, all labels of a unit would take a hundred times what is in them.
    entries = slice(width if 2 * used > width else used)
    extra = values[:, width:]
    lse_at = 2 + int(record.entropy)
    labels = RowLabels(
        entry_ids=integers[:, entries],
        entry_logprobs=values[:, entries],
        head_len=head_len,
        tail_len=tail_len,
        entry_counts=integers[:, width + 2 :][:, entries] if record.kind == "sampled" else None,
        tail_logmass=extra[:, 0],
        target_logprob=extra[:, 1],
        target_rank=np.asarray(packed.ranks),
        entropy=extra[:, 2] if record.entropy else None,
        lse=extra[:, lse_at:] if record.temperatures else None,
    )
    return labels if 2 * used > width else _copied(labels)


def _copied(labels: RowLabels) -> RowLabels:
    """The same labels, without the arrays that they are views of."""
    columns: dict[str, Any] = {
        field.name: None
        if getattr(labels, field.name) is None
        else getattr(labels, field.name).copy()
        for field in fields(labels)
    }
    return RowLabels(**columns)
