"""Shares of a mixture hold at every moment, and follow from one number."""

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from trainer.config.train import WeightedView
from trainer.data.mixture import normalised_shares, sequence_source, sequences_per_view

WEIGHTS = st.lists(st.floats(0.001, 1000.0, allow_nan=False), min_size=1, max_size=5)


def shares(weights: list[float]) -> tuple[Fraction, ...]:
    return normalised_shares([WeightedView(view="v", weight=weight) for weight in weights])


@given(WEIGHTS, st.integers(0, 10**9))
def test_counts_are_the_shares_within_one_a_view(weights: list[float], number: int) -> None:
    wanted = shares(weights)
    counts = sequences_per_view(number, wanted)
    assert sum(counts) == number
    for count, share in zip(counts, wanted, strict=True):
        assert abs(count - number * share) <= len(weights)


@given(WEIGHTS, st.integers(0, 10**6))
def test_places_count_each_view_through(weights: list[float], start: int) -> None:
    wanted = shares(weights)
    counts = sequences_per_view(start, wanted)
    for number in range(start, start + 50):
        view, index = sequence_source(number, wanted)
        assert index == counts[view]
        counts[view] += 1
        assert counts == sequences_per_view(number + 1, wanted)


def test_two_views_by_the_formula() -> None:
    wanted = shares([1.0, 3.0])
    assert [sequence_source(i, wanted)[0] for i in range(8)] == [1, 1, 1, 0, 1, 1, 1, 0]
    assert shares([0.1, 0.2]) == (Fraction(1, 3), Fraction(2, 3))
