"""Keys: frozen values, nothing collides by shape, and set membership over sorted arrays."""

import numpy as np
import pytest

from schemas import keys
from schemas.spec import GenerationSpec

TOKENS = np.array([5, 6, 7, 8], np.int32)
SPANS = np.array([1, 4], np.int32)


def test_values_are_frozen() -> None:
    """If these change, every cached label is lost."""
    generation = GenerationSpec(n=2, temperature=0.7, top_p=0.9, max_tokens=32, seed=3)
    made = [
        keys.row_key(TOKENS, SPANS).hex(),
        keys.content_key(TOKENS, SPANS).hex(),
        keys.generated_row_key(TOKENS, generation, 1).hex(),
        keys.place_key("a/b.txt", 7, 0).hex(),
        keys.unit_key(keys.stack_keys([b"b" * 16, b"a" * 16])),
    ]
    assert made == [
        "3385e1db6450babcc417521a1d1e3315",
        "536ae3139639bf7e2894b8afea1a14c5",
        "8773ad7cc9cec67b02300d7ccbe1a91f",
        "cdb2b6e5fba5a9b6b4e113daa480b0a3",
        "93248dd5d1b060804ab08da36365ad68",
    ]


def test_keys_tell_their_parts_apart() -> None:
    short, long = TOKENS[:2], TOKENS[2:]
    generation = GenerationSpec()
    made = {
        keys.row_key(TOKENS, SPANS),
        keys.row_key(short, np.concatenate([long, SPANS])),
        keys.row_key(TOKENS, SPANS[:0], SPANS),
        keys.row_key(TOKENS, SPANS, TOKENS),
        keys.content_key(TOKENS, SPANS),
        keys.generated_row_key(TOKENS, generation, 0),
        keys.generated_row_key(TOKENS, generation, 1),
        keys.generated_row_key(TOKENS, generation.model_copy(update={"temperature": 0.5}), 0),
        keys.place_key("a", 1, 2),
        keys.place_key("a", 2, 1),
        keys.place_key("b", 1, 2),
    }
    assert len(made) == 11


def test_keys_do_not_depend_on_how_the_numbers_are_kept() -> None:
    strided = np.repeat(TOKENS, 2)[::2]
    wide, big = TOKENS.astype(np.int64), TOKENS.astype(">i4")
    for other in (strided, wide, big):
        assert keys.row_key(other, SPANS) == keys.row_key(TOKENS, SPANS)
    assert keys.row_key(TOKENS, SPANS, TOKENS[:0]) == keys.row_key(TOKENS, SPANS)


def test_more_samples_keep_the_keys_of_the_first() -> None:
    one, many = GenerationSpec(n=1), GenerationSpec(n=16)
    first = keys.generated_row_key(TOKENS, one, 0)
    assert keys.generated_row_key(TOKENS, many, 0) == first


def test_unit_key_does_not_depend_on_the_order() -> None:
    rng = np.random.default_rng(0)
    some = rng.integers(0, 256, (50, 16)).astype(np.uint8)
    assert keys.unit_key(some) == keys.unit_key(some[::-1]) == keys.unit_key(rng.permutation(some))
    assert keys.unit_key(some) != keys.unit_key(some[:-1])


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_membership_and_places(count: int) -> None:
    rng = np.random.default_rng(1)
    # Few distinct bytes and many zeros: keys that end in zeros have to be told apart, too.
    pool = np.unique(rng.integers(0, 2, (2000, 16)).astype(np.uint8), axis=0)
    rng.shuffle(pool)
    mine = pool[:count]
    asked = pool[rng.integers(0, len(pool), 500)]
    have = {key.tobytes() for key in mine}
    expected = np.array([key.tobytes() in have for key in asked])
    np.testing.assert_array_equal(keys.contains(keys.keys_to_sorted(mine), asked), expected)
    places = keys.find_keys(mine, asked)
    np.testing.assert_array_equal(places >= 0, expected)
    np.testing.assert_array_equal(mine[places[expected]], asked[expected])
