"""Units of about equally many tokens, whatever the lengths of the rows."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labeler.config import LabelConfig
from labeler.corpus.requests import from_table, label_request, to_table
from labeler.units.sizing import cut_units, rows_gathered, unwrapped, wrapped


def requests(lengths: list[int]) -> pa.Table:
    spans = np.array([1, 2], np.int32)
    rows = [np.full(length, index, np.int32) for index, length in enumerate(lengths)]
    return to_table([label_request(ids, spans, "s", n, 0) for n, ids in enumerate(rows)])


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), max_size=60), st.integers(1, 200), st.sampled_from([0, 7]))
def test_every_row_is_in_one_unit_and_none_is_too_large(
    lengths: list[int], unit_tokens: int, generated: int
) -> None:
    table = requests(lengths)
    units = cut_units(table, unit_tokens, generated)
    assert all(unit.num_rows for unit in units)
    if units:
        assert pa.concat_tables(units).equals(table)
    longest = max(lengths, default=0) + generated
    for unit in units:
        sizes = [len(request.token_ids) + generated for request in from_table(unit)]
        assert sum(sizes) <= unit_tokens + longest


def test_units_are_alike_where_rows_are_not() -> None:
    rng = np.random.default_rng(0)
    lengths = [int(length) for length in np.exp(rng.uniform(1, 6, 2000))]
    sizes = [
        sum(len(request.token_ids) for request in from_table(unit))
        for unit in cut_units(requests(lengths), 10_000)
    ]
    assert min(sizes) > 0.85 * max(sizes)  # no small rest either


def test_unit_travels_as_one_row() -> None:
    table = requests([3, 1, 8])
    one, two = unwrapped(pa.concat_tables([wrapped(table), wrapped(table.slice(1, 1))]))
    assert one.equals(table)
    assert two.equals(table.slice(1, 1))
    assert unwrapped(wrapped(table).slice(0, 0)) == []


@pytest.mark.parametrize(
    ("max_tokens", "unit_tokens", "unit_rows", "gathered"),
    [
        (1024, 2**17, 4096, 4096),
        (1024, 2**17, 100, 100),
        (131_072, 2**17, 4096, 32),
        (131_072, 1024, 4096, 1),
    ],
)
def test_what_is_gathered_is_bounded(
    max_tokens: int, unit_tokens: int, unit_rows: int, gathered: int
) -> None:
    config = LabelConfig.model_validate(
        {
            "labels": "x",
            "corpus": {"path": "y"},
            "teacher": {"model": "z"},
            "text": {"max_tokens": max_tokens, "overlap": 0},
            "run": {"unit_tokens": unit_tokens, "unit_rows": unit_rows},
        }
    )
    assert rows_gathered(config) == gathered
