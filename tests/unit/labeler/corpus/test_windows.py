"""The example of the module's docstring, and the numbers of windows without a target."""

import numpy as np

from labeler.corpus.windows import all_but_first, clip_spans, cut_windows


def test_windows_are_those_of_the_docstrings_example() -> None:
    windows = cut_windows(10, all_but_first(10), max_tokens=5, overlap=2)
    cut = [(w.index, w.start, w.end, w.spans.tolist()) for w in windows]
    assert cut == [(0, 0, 5, [1, 5]), (1, 3, 8, [2, 5]), (2, 6, 10, [2, 4])]


def test_overlap_zero_still_repeats_one_token() -> None:
    windows = cut_windows(7, all_but_first(7), max_tokens=4, overlap=0)
    assert [(w.start, w.end, w.spans.tolist()) for w in windows] == [(0, 4, [1, 4]), (3, 7, [1, 4])]


def test_windows_without_a_target_are_left_out_but_counted() -> None:
    windows = cut_windows(10, np.array([8, 10], np.int32), max_tokens=5, overlap=2)
    assert [(w.index, w.spans.tolist()) for w in windows] == [(2, [2, 4])]


def test_no_window_without_targets() -> None:
    assert cut_windows(1, all_but_first(1), 5, 2) == []
    assert cut_windows(0, all_but_first(0), 5, 2) == []
    assert cut_windows(9, np.empty(0, np.int32), 5, 2) == []


def test_clip_spans_drops_what_is_outside() -> None:
    spans = np.array([1, 3, 4, 8, 9, 10], np.int32)
    assert clip_spans(spans, 2, 6).tolist() == [2, 3, 4, 6]
    assert clip_spans(spans, 3, 4).tolist() == []
