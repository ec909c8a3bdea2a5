"""Labels of kind ``topk`` from candidates, when the full distribution is unavailable.

vLLM returns for each position its k most probable ids and the position's own token, with
log-probabilities and ranks. The rest of a ``topk`` label follows from these: the probability of the
tail is 1 - (sum of the head), accurate to about 1e-6 from float32 log-probabilities. Draws, entropy
and other temperatures need the full distribution.
"""

import numpy as np
import numpy.typing as npt

from labeler.teachers.protocol import RowLabels
from schemas.errors import TeacherError

TAIL_RESOLUTION = 2.0**-20
"""Smaller tails are indistinguishable from none: the accuracy of float32 log-probabilities."""

# vLLM writes the logarithm of 0 like this in JSON, which has no infinity.
_NO_PROBABILITY = -9999.0

# Excess over 1 in the mass of a head beyond which the values are not log-probabilities.
_SLACK = 1e-3

LIMITS = {
    "tail_logmass": f"1 - (sum of the head), to about {TAIL_RESOLUTION:.0e}",
    "target_rank": "beyond the head, ties are counted in",
    "audit": "none, because the full distribution is not known",
}
"""Limits of such labels, for their provenance."""


def labels_from_topk(
    ids: npt.NDArray[np.int32],
    logprobs: npt.NDArray[np.float64],
    own: npt.NDArray[np.float64],
    own_ranks: npt.NDArray[np.int64],
    vocab_size: int,
) -> RowLabels:
    """Labels of kind ``topk`` of one row.

    Args:
        ids: int32 [N, K], heads in any order.
        logprobs: float64 [N, K], of these ids, nats; overwritten.
        own: float64 [N], nats, of the target token; overwritten.
        own_ranks: int64 [N], its rank, ties counted in; used if it is outside the head.
        vocab_size: V.

    Raises:
        TeacherError: the values are not log-probabilities.
    """
    for values in (logprobs, own):
        values[values <= _NO_PROBABILITY] = -np.inf
    order = np.lexsort((ids, -logprobs), axis=-1)  # by falling probability, ties by id
    ids = np.take_along_axis(ids, order, 1)
    logprobs = np.take_along_axis(logprobs, order, 1)
    count, width = ids.shape
    mass = np.exp(logprobs).sum(axis=1)
    if (mass > 1 + _SLACK).any() or (logprobs > _SLACK).any():
        raise TeacherError(
            f"the log-probabilities of a head sum to a probability of {mass.max():.6g}, expected "
            "at most 1; run vLLM with --logprobs-mode raw_logprobs"
        )
    larger = (logprobs > own[:, None]).sum(axis=1)
    ranks = np.where(larger < width, larger + 1, np.maximum(own_ranks, width + 1))
    return RowLabels(
        entry_ids=ids,
        entry_logprobs=np.minimum(logprobs, 0.0).astype(np.float32),
        head_len=np.full(count, width, np.int32),
        tail_len=np.zeros(count, np.int32),
        entry_counts=None,
        tail_logmass=_tail_logmass(mass, logprobs[:, -1], own, larger >= width, vocab_size - width),
        target_logprob=np.minimum(own, 0.0).astype(np.float32),
        target_rank=ranks.astype(np.int32),
        entropy=None,
        lse=None,
    )


def _tail_logmass(
    mass: npt.NDArray[np.float64],
    last: npt.NDArray[np.float64],
    own: npt.NDArray[np.float64],
    outside: npt.NDArray[np.bool_],
    others: int,
) -> npt.NDArray[np.float32]:
    """Log of 1 - (sum of the head) [N], clipped to the known bounds of the tail.

    The tail has at least the target's probability, if the target is outside the head, and at most
    the probability of the last id of the head for each other id.
    """
    least = np.where(outside, np.exp(own), 0.0)
    most = np.minimum(others * np.exp(last), 1.0)
    tail = np.minimum(np.maximum(np.maximum(1.0 - mass, TAIL_RESOLUTION), least), most)
    with np.errstate(divide="ignore"):
        return np.log(tail).astype(np.float32)
