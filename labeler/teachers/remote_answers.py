"""What a vLLM server says of a prompt's positions -> labels of kind ``topk``.

The answer lists for each position the k most probable ids and the token that stands there, with
log-probabilities and ranks. What the record wants beside them follows from these: the probability
of the tail is 1 - (sum of the head), which from float32 log-probabilities is right to about 1e-6.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from labeler.teachers.base import RowLabels, span_targets
from schemas.errors import TeacherError

TAIL_RESOLUTION = 2.0**-20
"""Tails below cannot be told from none: float32 log-probabilities are right to about this."""

# What JSON has for the logarithm of 0, as vLLM writes it.
_NO_PROBABILITY = -9999.0

# By how much the probabilities of a head may exceed 1 before they are taken for something else.
_SLACK = 1e-3


def row_labels(
    prompt_logprobs: list[dict[str, dict[str, Any]] | None],
    token_ids: np.ndarray,
    label_spans: np.ndarray,
    k: int,
    vocab_size: int,
) -> RowLabels:
    """The labels of a row.

    Args:
        prompt_logprobs: For each of L positions ``{id: {"logprob", "rank"}}``: the k most probable
            ids over the token there, and that token itself; the first is None.
        token_ids: integer [L].
        label_spans: flat [start, end) pairs of target indices.
        k: entries of a head.
        vocab_size: ids are in [0, vocab_size).

    Returns:
        Heads of K = min(k, V) ids. A rank beyond the head counts ids that are exactly as probable
        as the token in, as vLLM does.

    Raises:
        TeacherError: the answer is not what was asked for.
    """
    width = min(k, vocab_size)
    targets = span_targets(label_spans)
    if len(prompt_logprobs) != len(token_ids):
        raise TeacherError(
            f"the server tells of {len(prompt_logprobs)} positions of a row of {len(token_ids)} "
            "tokens; it has to be a vLLM server, and nothing may cut its prompts"
        )
    ids = np.empty((len(targets), width), np.int32)
    logprobs = np.empty((len(targets), width), np.float64)
    own = np.empty(len(targets), np.float64)
    told_ranks = np.empty(len(targets), np.int64)
    for label, target in enumerate(targets):
        here = prompt_logprobs[target] or {}
        token = str(int(token_ids[target]))
        outside = len(here) == width + 1  # then the token is not among the k
        if token not in here or len(here) not in (width, width + 1):
            raise TeacherError(
                f"the server tells {len(here)} ids of position {target}, expected the token "
                f"{token} that stands there and the {width} most probable ones"
            )
        own[label], told_ranks[label] = here[token]["logprob"], here[token]["rank"] or 0
        head = [item for item in here.items() if not outside or item[0] != token]
        ids[label] = [int(name) for name, _ in head]
        logprobs[label] = [entry["logprob"] for _, entry in head]
    return _labels(ids, logprobs, own, told_ranks, vocab_size)


def _labels(
    ids: npt.NDArray[np.int32],
    logprobs: npt.NDArray[np.float64],
    own: npt.NDArray[np.float64],
    told_ranks: npt.NDArray[np.int64],
    vocab_size: int,
) -> RowLabels:
    """Labels from heads in any order [N, K], and the tokens' own log-probabilities and ranks."""
    for values in (logprobs, own):
        values[values <= _NO_PROBABILITY] = -np.inf
    order = np.lexsort((ids, -logprobs), axis=-1)  # by falling probability, ties by id
    ids = np.take_along_axis(ids, order, 1)
    logprobs = np.take_along_axis(logprobs, order, 1)
    count, width = ids.shape
    mass = np.exp(logprobs).sum(axis=1)
    if (mass > 1 + _SLACK).any() or (logprobs > _SLACK).any():
        raise TeacherError(
            "the server's numbers are no log-probabilities: those of a head sum to "
            f"{mass.max():.6g}; it has to run with --logprobs-mode raw_logprobs"
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
