"""Cuts documents longer than the teacher's context into windows.

Every token of a document except the first is a target exactly once. Later windows repeat the
preceding ``overlap`` tokens as context, at least one, because a label needs a preceding token::

    document  0 1 2 3 4 5 6 7 8 9        max_tokens 5, overlap 2
    window 0  0[1 2 3 4]                 [..] are the targets
    window 1        3 4[5 6 7]
    window 2              6 7[8 9]

BOS, if the policy adds it, is the first token of a document.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Document:
    """One document before it is cut into windows.

    Attributes:
        token_ids: int32 [L].
        spans: int32 [2 * spans], flat half-open [start, end) pairs of target indices, start >= 1;
            empty for a prompt.
    """

    token_ids: Int32Array
    spans: Int32Array


@dataclass(frozen=True)
class Window:
    """Tokens [start, end) of a document.

    Attributes:
        index: Number of the window in its document; windows without a target leave gaps.
        start, end: Half-open range in the document's tokens.
        spans: int32 [2 * spans], half-open [start, end) pairs of target indices **in the window**.
    """

    index: int
    start: int
    end: int
    spans: Int32Array


def all_but_first(num_tokens: int) -> Int32Array:
    """The spans that make every token but the first a target."""
    return np.array([1, num_tokens] if num_tokens > 1 else [], np.int32)


def clip_spans(spans: Int32Array, start: int, end: int) -> Int32Array:
    """Flat [start, end) pairs cut to a range of the document; pairs outside are dropped."""
    pairs = np.clip(spans.reshape(-1, 2), start, end)
    return np.ascontiguousarray(pairs[pairs[:, 0] < pairs[:, 1]]).reshape(-1)


def cut_windows(num_tokens: int, spans: Int32Array, max_tokens: int, overlap: int) -> list[Window]:
    """Cuts a document into windows of at most ``max_tokens``.

    Args:
        num_tokens: Length of the document.
        spans: int32 flat pairs, sorted and disjoint, 1 <= start < end <= num_tokens.
        max_tokens: At least 2.
        overlap: Tokens that later windows repeat, below ``max_tokens - 1``; at least one token is
            repeated in any case.

    Returns:
        The windows that have a target, in order.
    """
    context = max(overlap, 1)
    windows = []
    new, index = 1, 0  # new: the first index that is not a target yet
    while new < num_tokens:
        start = 0 if index == 0 else new - context
        end = min(start + max_tokens, num_tokens)
        inside = clip_spans(spans, new, end)
        if inside.size:
            # Minus an int32, so that the spans stay int32.
            windows.append(Window(index, start, end, inside - np.int32(start)))
        new, index = end, index + 1
    return windows
