"""Every token of a document but its first is a target exactly once, with context before it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from labeler.corpus.windows import all_but_first, cut_windows


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, np.ndarray, int, int]:
    num_tokens = draw(st.integers(0, 200))
    max_tokens = draw(st.integers(2, 40))
    overlap = draw(st.integers(0, max_tokens - 2))
    if draw(st.booleans()):
        return num_tokens, all_but_first(num_tokens), max_tokens, overlap
    bounds = draw(st.sets(st.integers(1, max(num_tokens, 1)), max_size=12))
    bounds = sorted(bounds)[: len(bounds) // 2 * 2]
    return num_tokens, np.array(bounds, np.int32), max_tokens, overlap


@given(cuts())
def test_targets_are_covered_once_and_have_context(cut: tuple[int, np.ndarray, int, int]) -> None:
    num_tokens, spans, max_tokens, overlap = cut
    wanted = [t for start, end in spans.reshape(-1, 2) for t in range(start, end)]
    found = []
    for window in cut_windows(num_tokens, spans, max_tokens, overlap):
        assert 2 <= window.end - window.start <= max_tokens
        assert window.end <= num_tokens
        pairs = window.spans.reshape(-1, 2)
        assert window.spans.dtype == np.int32
        assert len(pairs) > 0
        assert (np.diff(window.spans) >= 0).all()
        assert pairs[0, 0] >= 1
        assert pairs[-1, 1] <= window.end - window.start
        for start, end in pairs + window.start:
            found.extend(range(start, end))
        # No target has less context than the overlap, unless the document has no more.
        first = int(pairs[0, 0]) + window.start
        assert first - window.start >= min(first, max(overlap, 1))
    assert found == wanted


@given(cuts())
def test_document_that_fits_is_one_window(cut: tuple[int, np.ndarray, int, int]) -> None:
    num_tokens, spans, _, overlap = cut
    windows = cut_windows(
        num_tokens, spans, max(num_tokens, 2), min(overlap, max(num_tokens, 2) - 2)
    )
    if spans.size == 0 or num_tokens < 2:
        assert windows == []
    else:
        (window,) = windows
        assert (window.index, window.start, window.end) == (0, 0, num_tokens)
        np.testing.assert_array_equal(window.spans, spans)
