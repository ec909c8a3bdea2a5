"""Operations on spans, offsets and ids as flat arrays, and checks that several rooms share."""

from typing import Any

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Int64s = npt.NDArray[np.int64]
Integers = npt.NDArray[np.integer[Any]]


def offsets_of(lengths: npt.NDArray[Any]) -> Int64s:
    """int64 [n + 1]: the running sum of n lengths, starting at 0."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def concatenated_ranges(starts: Integers, lengths: Integers) -> Int64s:
    """int64 [sum of lengths]: the integers of each range [start, start + length), in order."""
    begins = offsets_of(lengths)
    return np.arange(begins[-1]) + np.repeat(starts - begins[:-1], lengths)


def span_targets(label_spans: Integers) -> Int64s:
    """int64 [N]: the target indices that flat half-open [start, end) pairs cover, in order."""
    starts = label_spans[0::2].astype(np.int64)
    return concatenated_ranges(starts, label_spans[1::2] - starts)


def target_positions(label_spans: Integers, span_offsets: Int64s) -> tuple[Int64s, Int64s]:
    """Expands the spans of R rows.

    Args:
        label_spans: [2 * spans], flat half-open [start, end) pairs of target indices.
        span_offsets: int64 [R + 1], into `label_spans`.

    Returns:
        int64 [sum N], target indices within their row, row by row; and int64 [R + 1], the offsets
        of the rows in it.
    """
    return span_targets(label_spans), label_offsets(label_spans, span_offsets)


def label_offsets(label_spans: Integers, span_offsets: Int64s) -> Int64s:
    """int64 [R + 1]: offsets of the rows in arrays with one value per target index."""
    return offsets_of(label_spans[1::2].astype(np.int64) - label_spans[0::2])[span_offsets // 2]


def span_problem(label_spans: Integers, num_tokens: int) -> str:
    """Why a row's spans are not ascending, disjoint and within [1, num_tokens); empty if they are.

    Args:
        label_spans: flat [start, end) pairs of one row.
        num_tokens: number of tokens in the row.
    """
    if len(label_spans) % 2:
        return f"{len(label_spans)} span bounds; expected [start, end) pairs"
    # Adjacent spans may touch, but no span may be empty.
    steps = np.diff(label_spans.astype(np.int64))
    if (steps[0::2] < 1).any() or (steps[1::2] < 0).any():
        return f"spans {label_spans.tolist()} are empty, unsorted or overlap"
    if len(label_spans) and not 1 <= label_spans[0] < label_spans[-1] <= num_tokens:
        found = f"[{label_spans[0]}, {label_spans[-1]})"
        return f"spans cover {found}; expected within [1, {num_tokens})"
    return ""


def outside_vocabulary(ids: Integers, vocab_size: int) -> Bools:
    """bool, shape of `ids`: marks ids that are not in [0, vocab_size)."""
    # One comparison checks both ends: as unsigned integers, negative ids are large.
    unsigned = ids.view(f"u{ids.dtype.itemsize}")
    return np.asarray(unsigned >= unsigned.dtype.type(vocab_size))


def unknown_token_problem(ids: Integers, vocab_size: int) -> str:
    """Reports the first id of a row that is not in [0, vocab_size); empty if none is."""
    outside = outside_vocabulary(ids, vocab_size)
    if not outside.any():
        return ""
    index = int(np.argmax(outside))
    return f"token {int(ids[index])} at index {index}; expected ids in [0, {vocab_size})"
