"""The KL divergence that rounding alone adds to labels, computed without an audit."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from labeler.quality.fidelity import partition_kl
from labeler.teachers.protocol import RowLabels
from schemas.record import LabelRows
from schemas.spec import RecordSpec


def rounding_kl(
    labels: Sequence[RowLabels], stored: LabelRows, record: RecordSpec
) -> npt.NDArray[np.float64]:
    """KL(labels before rounding, rows assembled from them).

    Args:
        labels: one per row, as the teacher returned them.
        stored: the same rows in the stored form.
        record: of both.

    Returns:
        float64 [sum N], nats per label.
    """
    lengths = np.concatenate([row.head_len.astype(np.int64) + row.tail_len for row in labels])
    width = max(row.entry_ids.shape[1] for row in labels)
    true = np.concatenate([_wide(row.entry_logprobs, width) for row in labels])
    used = np.arange(width) < lengths[:, None]
    assert stored.entry_logprobs is not None
    assert stored.tail_logmass is not None
    kept = np.zeros(true.shape)
    kept[used] = stored.entry_logprobs
    tail = np.concatenate([row.tail_logmass for row in labels])
    if record.kind != "sampled":
        heads = np.concatenate([row.head_len for row in labels])
        used = np.arange(width) < heads[:, None]
    return partition_kl(
        true, np.exp(tail.astype(np.float64)), kept, stored.tail_logmass, used, record
    )


def _wide(values: npt.NDArray[np.float32], width: int) -> npt.NDArray[np.float32]:
    """Pads rows with zeros to a common width."""
    if values.shape[1] == width:
        return values
    padded = np.zeros((len(values), width), np.float32)
    padded[:, : values.shape[1]] = values
    return padded
