"""Labels of positions in the three arrays that vLLM's engine ships from its workers."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from labeler.label_head.position_labels import PositionLabels
from labeler.teachers.audits import Audit
from labeler.teachers.protocol import RowLabels
from schemas.spec import RecordSpec

# The rank has an array of its own; these share one in this order.
_INTEGERS = ("entry_ids", "head_len", "tail_len", "entry_counts")
_FLOATS = ("entry_logprobs", "tail_logmass", "target_logprob", "entropy", "lse")


class Packed(NamedTuple):
    """Labels of N positions, followed by the audits of A of them.

    An audit puts the columns of ``labeler.label_head.audit_logits`` into its floats.

    Attributes:
        integers: int32 [N + A, columns of ``_INTEGERS``].
        floats: float32 [N + A, columns of ``_FLOATS``].
        ranks: int32 [N + A].
    """

    integers: torch.Tensor
    floats: torch.Tensor
    ranks: torch.Tensor


def _columns(record: RecordSpec, width: int) -> dict[str, int]:
    """How many columns each field takes, by name; fields that the record lacks are left out."""
    columns = {"entry_ids": width, "head_len": 1, "tail_len": 1}
    if record.kind == "sampled":
        columns["entry_counts"] = width
    columns |= {"entry_logprobs": width, "tail_logmass": 1, "target_logprob": 1}
    if record.entropy:
        columns["entropy"] = 1
    if record.temperatures:
        columns["lse"] = len(record.temperatures)
    return columns


def empty_packed(
    count: int, record: RecordSpec, vocab_size: int, device: torch.device | None = None
) -> Packed:
    """Memory for ``count`` labels and audits, on the host or a device."""
    columns = _columns(record, record.most_entries(vocab_size))
    num_integers, num_floats = (
        sum(columns.get(name, 0) for name in names) for names in (_INTEGERS, _FLOATS)
    )
    return Packed(
        torch.empty(count, num_integers, dtype=torch.int32, device=device),
        torch.empty(count, num_floats, device=device),
        torch.empty(count, dtype=torch.int32, device=device),
    )


def pack(labels: PositionLabels) -> Packed:
    """Labels as three arrays; ``unpack`` is the inverse."""

    def join(names: tuple[str, ...]) -> torch.Tensor:
        present = [c for name in names if (c := getattr(labels, name)) is not None]
        return torch.cat([c if c.ndim == 2 else c[:, None] for c in present], dim=1)

    return Packed(join(_INTEGERS).int(), join(_FLOATS), labels.target_rank)


def unpack(packed: Packed, record: RecordSpec, audited: npt.NDArray[np.int64]) -> RowLabels:
    """The packed labels, as views of the arrays; as copies if most slots are empty.

    Args:
        packed: N labels and A audits.
        record: of the labels.
        audited: int64 [A], the labels that were audited.
    """
    integers, floats, ranks = (np.asarray(array) for array in packed)
    count = len(ranks) - len(audited)
    width = floats.shape[1] - sum(_columns(record, 0).get(name, 0) for name in _FLOATS)
    columns = _columns(record, width)
    fields: dict[str, Any] = {"entry_counts": None, "entropy": None, "lse": None}
    fields["target_rank"] = ranks[:count]
    for names, values in ((_INTEGERS, integers), (_FLOATS, floats)):
        at = 0
        for name in names:
            if name in columns:
                end = at + columns[name]
                is_matrix = name == "lse" or name.startswith("entry_")
                fields[name] = values[:count, at:end] if is_matrix else values[:count, at]
                at = end
    used = int((fields["head_len"] + fields["tail_len"]).max(initial=0))
    # With a small tau, the labels of a unit would take a hundred times the size of their content.
    if 2 * used <= width:
        for name in ("entry_ids", "entry_logprobs", "entry_counts"):
            fields[name] = None if fields[name] is None else fields[name][:, :used]
        fields = {name: None if c is None else c.copy() for name, c in fields.items()}
    audit = floats[count:, : width + 2].copy()
    fields["audit"] = Audit.from_columns(audited, audit) if len(audited) else None
    return RowLabels(**fields)
