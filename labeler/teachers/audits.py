"""Audits: the full distribution behind a sample of a row's labels."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from schemas.record.uniforms import AUDITING, uniforms


class Audit(NamedTuple):
    """The full distribution at A positions of a row.

    Attributes:
        labels: int64 [A], indices of the labels in the row.
        logprobs: float32 [A, K], nats, of the ids that the label keeps; undefined past its end.
        tail: float32 [A], probability outside the head.
        best: float32 [A], probability of the head_len most probable ids: the most that a head of
            this length can cover.
    """

    labels: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float32]
    tail: npt.NDArray[np.float32]
    best: npt.NDArray[np.float32]

    @staticmethod
    def from_columns(labels: npt.NDArray[np.int64], columns: npt.NDArray[np.float32]) -> "Audit":
        """Builds the audit of these labels from the output of ``audit_logits``."""
        return Audit(labels, columns[:, :-2], columns[:, -2], columns[:, -1])


def audited_labels(row_key: bytes, num_labels: int, rate: float) -> npt.NDArray[np.int64]:
    """Selects every 1/rate-th label of a row for audit, from an offset determined by its key.

    Args:
        row_key: 16 bytes.
        num_labels: N.
        rate: fraction of labels, 0 to 1; 0: none.

    Returns:
        int64, rising, in [0, N).
    """
    if rate <= 0.0:
        return np.zeros(0, np.int64)
    start = uniforms(row_key, np.zeros(1, np.int64), 1, 0, AUDITING)[0, 0]
    points = (start + np.arange(int(num_labels * rate) + 1)) / rate
    return points[points < num_labels].astype(np.int64)
