"""A second opinion on a few labels: which of them, and what the full distribution says of each."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from schemas.record.uniforms import AUDITING, uniforms


class Audit(NamedTuple):
    """What A positions of a row look like in the full distribution.

    Attributes:
        labels: int64 [A], which labels of the row.
        logprobs: float32 [A, K], of the ids that the label keeps, nats; anything behind its end.
        tail: float32 [A], the probability outside the head.
        best: float32 [A], the probability of the most probable head_len ids: what a head of this
            length covers at most.
    """

    labels: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float32]
    tail: npt.NDArray[np.float32]
    best: npt.NDArray[np.float32]


def audited_labels(row_key: bytes, num_labels: int, rate: float) -> npt.NDArray[np.int64]:
    """Which labels of a row are audited: every 1/rate-th of them, from a place that its key says.

    Args:
        row_key: 16 bytes.
        num_labels: N.
        rate: share of labels, 0 to 1; 0: none.

    Returns:
        int64, rising, in [0, N).
    """
    if rate <= 0.0:
        return np.zeros(0, np.int64)
    start = uniforms(row_key, np.zeros(1, np.int64), 1, 0, AUDITING)[0, 0]
    points = (start + np.arange(int(num_labels * rate) + 1)) / rate
    return points[points < num_labels].astype(np.int64)


def audit_of(labels: npt.NDArray[np.int64], columns: npt.NDArray[np.float32]) -> Audit:
    """The audit of a row from what ``audit_logits`` gave for these labels of it."""
    return Audit(labels, columns[:, :-2], columns[:, -2], columns[:, -1])
