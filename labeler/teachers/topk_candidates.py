"""What the most probable ids of each position tell, where the full distribution is out of reach.

vLLM's own path gives for each position the k most probable ids and the token that stands there,
with log-probabilities and ranks. What a record of kind ``topk`` wants beside them follows: the
probability of the tail is 1 - (sum of the head), which from float32 log-probabilities is right to
about 1e-6. Draws, entropy and other temperatures need the full distribution and cannot be had.
"""

import numpy as np
import numpy.typing as npt

from labeler.teachers.protocol import RowLabels
from schemas.errors import TeacherError
from schemas.spec import RecordSpec

TAIL_RESOLUTION = 2.0**-20
"""Tails below cannot be told from none: float32 log-probabilities are right to about this."""

# What JSON has for the logarithm of 0, as vLLM writes it.
_NO_PROBABILITY = -9999.0

# By how much the probabilities of a head may exceed 1 before they are taken for something else.
_SLACK = 1e-3

LIMITS = {
    "tail_logmass": f"1 - (sum of the head), to about {TAIL_RESOLUTION:.0e}",
    "target_rank": "beyond the head, ties are counted in",
    "audit": "none, because the full distribution is not told",
}
"""For the provenance of such labels."""


def unsupported_by_topk(record: RecordSpec) -> str:
    """What a record wants that candidates cannot tell; empty: nothing."""
    wants = [] if record.kind == "topk" else [f'kind "{record.kind}"']
    wants += [name for name in ("entropy", "temperatures") if getattr(record, name)]
    return ", ".join(wants)


def labels_from_topk(
    ids: npt.NDArray[np.int32],
    logprobs: npt.NDArray[np.float64],
    own: npt.NDArray[np.float64],
    told_ranks: npt.NDArray[np.int64],
    vocab_size: int,
) -> RowLabels:
    """Labels of kind ``topk`` of one row.

    Args:
        ids: int32 [N, K], heads in any order.
        logprobs: float64 [N, K], theirs, nats; overwritten.
        own: float64 [N], of the token that stands there; overwritten.
        told_ranks: int64 [N], its rank, ties counted in; used where it is not in the head.
        vocab_size: V.

    Raises:
        TeacherError: these are no log-probabilities.
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
            "these are no log-probabilities: those of a head sum to a probability of "
            f"{mass.max():.6g}; vLLM has to run with --logprobs-mode raw_logprobs"
        )
    larger = (logprobs > own[:, None]).sum(axis=1)
    ranks = np.where(larger < width, larger + 1, np.maximum(told_ranks, width + 1))
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
    """Log of 1 - (sum of the head) [N], within what is known of the tail.

    It is no less than the token's own probability, where that is outside, and no more than if all
    other ids were as probable as the last of the head.
    """
    least = np.where(outside, np.exp(own), 0.0)
    most = np.minimum(others * np.exp(last), 1.0)
    tail = np.minimum(np.maximum(np.maximum(1.0 - mass, TAIL_RESOLUTION), least), most)
    with np.errstate(divide="ignore"):
        return np.log(tail).astype(np.float32)
