"""Random numbers of draws: which row, which position, which seed, and nothing else."""

import numpy as np

from schemas.record.uniforms import LABELLING, REDUCING, uniforms

KEY = bytes(range(16))
EVERYWHERE = np.arange(1, 400)


def test_positions_do_not_depend_on_which_others_are_asked_for() -> None:
    for per_position in (1, 4, 30):
        whole = uniforms(KEY, EVERYWHERE, per_position, seed=3)
        some = np.array([1, 2, 3, 57, 200, 201, 399])
        assert np.array_equal(uniforms(KEY, some, per_position, seed=3), whole[some - 1])


def test_rows_seeds_and_streams_differ() -> None:
    base = uniforms(KEY, EVERYWHERE, 1, seed=0)
    others = [
        uniforms(bytes(16), EVERYWHERE, 1, seed=0),
        uniforms(KEY, EVERYWHERE, 1, seed=1),
        uniforms(KEY, EVERYWHERE, 1, seed=2**64 - 1),
        uniforms(KEY, EVERYWHERE, 1, seed=0, stream=REDUCING),
    ]
    for other in others:
        assert not np.intersect1d(base, other).size
    assert np.array_equal(base, uniforms(KEY, EVERYWHERE, 1, seed=0, stream=LABELLING))


def test_uniforms_are_frozen() -> None:
    """Labels that were made must be made again: these values are pinned."""
    found = uniforms(KEY, np.array([1, 2, 1000]), 2, seed=7)
    assert found.tolist() == [
        [0.5098820411241614, 0.11970345003430383],
        [0.8855368701837248, 0.6266686114090881],
        [0.7523703760904881, 0.07485479452832744],
    ]


def test_uniform() -> None:
    found = uniforms(KEY, np.arange(1, 20_001), 3, seed=11)
    assert found.min() >= 0.0
    assert found.max() < 1.0
    assert abs(found.mean() - 0.5) < 0.005
    counts, _ = np.histogram(found, bins=16, range=(0.0, 1.0))
    expected = found.size / 16
    assert ((counts - expected) ** 2 / expected).sum() < 45  # chi-squared, 15 degrees: p = 1e-4


def test_uniforms_of_no_positions_are_empty() -> None:
    assert uniforms(KEY, np.zeros(0, np.int64), 3, seed=0).shape == (0, 3)
