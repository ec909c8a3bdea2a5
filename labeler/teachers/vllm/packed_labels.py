"""Labels of positions in the three arrays that vLLM's engine ships from its workers."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from labeler.label_head.position_labels import PositionLabels
from labeler.teachers.audits import Audit
from labeler.teachers.protocol import RowLabels
from schemas.spec import RecordSpec

# Fields of the two matrices, in order, with the number of their columns; 0: one, read as a vector.
_Layout = list[tuple[str, int]]


class Packed(NamedTuple):
    """Labels of N positions, followed by the audits of A of them.

    An audit puts the columns of ``labeler.label_head.audit_logits`` into its floats.

    Attributes:
        integers: int32 [N + A, columns]: ids, lengths, counts.
        floats: float32 [N + A, columns]: log-probabilities, tail, target, entropy, lse.
        ranks: int32 [N + A].
    """

    integers: torch.Tensor
    floats: torch.Tensor
    ranks: torch.Tensor


def _layouts(record: RecordSpec, width: int) -> tuple[_Layout, _Layout]:
    """The fields of the integers and of the floats, for labels of ``width`` entries."""
    integers = [("entry_ids", width), ("head_len", 0), ("tail_len", 0)]
    if record.kind == "sampled":
        integers.append(("entry_counts", width))
    floats = [("entry_logprobs", width), ("tail_logmass", 0), ("target_logprob", 0)]
    if record.entropy:
        floats.append(("entropy", 0))
    if record.temperatures:
        floats.append(("lse", len(record.temperatures)))
    return integers, floats


def empty_packed(
    count: int, record: RecordSpec, vocab_size: int, device: torch.device | None = None
) -> Packed:
    """Memory for ``count`` labels and audits, on the host or a device."""
    num_integers, num_floats = (
        sum(columns or 1 for _, columns in layout)
        for layout in _layouts(record, record.most_entries(vocab_size))
    )
    return Packed(
        torch.empty(count, num_integers, dtype=torch.int32, device=device),
        torch.empty(count, num_floats, device=device),
        torch.empty(count, dtype=torch.int32, device=device),
    )


def pack(labels: PositionLabels, record: RecordSpec) -> Packed:
    """Labels of a record as three arrays; ``unpack`` is the inverse."""
    integers, floats = (
        [
            getattr(labels, name) if columns else getattr(labels, name)[:, None]
            for name, columns in layout
        ]
        for layout in _layouts(record, labels.entry_ids.shape[1])
    )
    return Packed(torch.cat(integers, dim=1), torch.cat(floats, dim=1), labels.target_rank)


def unpack(packed: Packed, record: RecordSpec, audited: npt.NDArray[np.int64]) -> RowLabels:
    """The packed labels, as views of the arrays; as copies if most slots are empty.

    Args:
        packed: N labels and A audits.
        record: of the labels.
        audited: int64 [A], the labels that were audited.
    """
    integers, floats, ranks = map(np.asarray, packed)
    count = len(ranks) - len(audited)
    width = floats.shape[1] - sum(columns or 1 for _, columns in _layouts(record, 0)[1][1:])
    fields: dict[str, Any] = {"entry_counts": None, "entropy": None, "lse": None}
    for values, layout in zip(
        (integers[:count], floats[:count]), _layouts(record, width), strict=True
    ):
        start = 0
        for name, columns in layout:
            fields[name] = values[:, start : start + columns] if columns else values[:, start]
            start += columns or 1
    fields["target_rank"] = ranks[:count]
    used = int((fields["head_len"] + fields["tail_len"]).max(initial=0))
    # With a small tau, mostly empty slots would take a hundred times the memory of the content.
    if 2 * used <= width:
        for name in ("entry_ids", "entry_logprobs", "entry_counts"):
            fields[name] = None if fields[name] is None else fields[name][:, :used]
        fields = {name: None if c is None else c.copy() for name, c in fields.items()}
    audit = floats[count:, : width + 2].copy()
    fields["audit"] = Audit.from_columns(audited, audit) if len(audited) else None
    return RowLabels(**fields)
