"""The entries of a label in float64, position by position, from their definitions."""

from typing import NamedTuple

import numpy as np

from schemas.spec import RecordSpec


class Entries(NamedTuple):
    """One position's entries: head ids by probability, draws by ascending id, their counts."""

    head: np.ndarray
    draws: np.ndarray
    counts: np.ndarray

    @property
    def ids(self) -> np.ndarray:
        return np.concatenate([self.head, self.draws])


def entries_of(
    logprobs: np.ndarray, record: RecordSpec, uniforms: np.ndarray | None = None
) -> Entries:
    """What a record keeps of one distribution.

    Args:
        logprobs: float64 [V].
        record: of any kind but ``tokens``.
        uniforms: float64, the random numbers of this position; None for kinds without draws.
    """
    order = np.lexsort((np.arange(len(logprobs)), -logprobs))
    none = np.empty(0, np.int64)
    if record.kind == "topk":
        return Entries(order[: record.k], none, none)
    if record.kind == "topp":
        falling = np.exp(logprobs[order])
        before = np.cumsum(falling) - falling
        count = np.count_nonzero((before < record.top_p) & (falling > 0))
        return Entries(order[: max(1, min(count, record.max_head))], none, none)
    assert uniforms is not None
    probs = probs_at(logprobs, record.drawn_at)
    if record.kind == "sampled":
        drawn = np.searchsorted(np.cumsum(probs), uniforms * probs.sum(), side="right")
        return Entries(none, *np.unique(drawn, return_counts=True))
    head = order[: max(1, np.count_nonzero(probs >= record.tau))]
    tail = probs.copy()
    tail[head] = 0.0
    ends = np.cumsum(tail)
    points = (uniforms[0] + np.arange(int(1 / record.tau) + 2)) * record.tau
    draws = np.searchsorted(ends, points[points < ends[-1]], side="right")
    return Entries(head, draws, np.ones_like(draws))


def probs_at(logprobs: np.ndarray, temperature: float) -> np.ndarray:
    """float64 [V]: p^(1/T), normalised."""
    scaled = logprobs / temperature
    return np.exp(scaled - np.logaddexp.reduce(scaled))
