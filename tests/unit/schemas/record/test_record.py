"""The column table, rows to Arrow and back, and what validation finds."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from schemas.errors import RecordError
from schemas.record import (
    COLUMNS,
    LOWEST_LOGPROB,
    LabelRows,
    arrow_schema,
    round_logprobs,
    target_positions,
    validate,
)
from schemas.spec import RecordSpec
from tests.support.label_rows import make_rows

VOCAB = 50
SPEC = RecordSpec(kind="topk", k=6, temperatures=(0.5, 2.0), teacher_context=True)

SCHEMA = """\
row_key: fixed_size_binary[16] not null
content_key: fixed_size_binary[16] not null
token_ids: list<element: int32 not null> not null
label_spans: list<element: int32 not null> not null
num_tokens: int32 not null
num_labels: int32 not null
head_len: list<element: uint16 not null> not null
tail_len: list<element: uint16 not null> not null
entry_ids: list<element: int32 not null> not null
entry_logprobs: list<element: halffloat not null> not null
tail_logmass: list<element: halffloat not null> not null
target_logprob: list<element: halffloat not null> not null
target_rank: list<element: int32 not null> not null
entropy: list<element: halffloat not null> not null
lse: list<element: halffloat not null> not null
teacher_context: list<element: int32 not null> not null"""


def test_schema_is_frozen() -> None:
    """A change here changes the format: raise SCHEMA_VERSION and say how old sets are read."""
    lines = [
        f"{field.name}: {field.type!s}{'' if field.nullable else ' not null'}"
        for field in arrow_schema(SPEC)
    ]
    assert "\n".join(lines) == SCHEMA
    assert arrow_schema(SPEC).metadata == {b"tutelage.schema_version": b"1"}


def test_every_column_is_stored_and_read_back_by_some_record() -> None:
    """A column that no rows can carry, or an array that has no column, would be lost on the way."""
    stored: set[str] = set()
    for record in (SPEC, RecordSpec(kind="sampled", draws=9)):
        rows = make_rows(5, record, VOCAB)
        table = rows.to_table(record)
        assert table.schema.names == list(record.columns)
        stored |= set(table.schema.names)
        again = LabelRows.from_table(table, record)
        for field in fields(LabelRows):
            np.testing.assert_array_equal(
                getattr(again, field.name), getattr(rows, field.name), err_msg=field.name
            )
    assert stored == set(COLUMNS)


def test_columns_follow_the_spec() -> None:
    assert "lse" not in RecordSpec().columns
    assert "entropy" not in RecordSpec(entropy=False).columns
    assert arrow_schema(RecordSpec(kind="tokens")).names == [
        "row_key", "content_key", "token_ids", "label_spans", "num_tokens", "num_labels",
    ]  # fmt: skip


def test_target_positions_expands_spans() -> None:
    spans = np.array([1, 3, 5, 6, 2, 4], np.int32)
    indices, offsets = target_positions(spans, np.array([0, 4, 4, 6]))
    np.testing.assert_array_equal(indices, [1, 2, 5, 2, 3])
    np.testing.assert_array_equal(offsets, [0, 3, 3, 5])


def test_arrow_shares_memory_and_reads_chunks_and_slices() -> None:
    rows = make_rows(9, SPEC, VOCAB)
    table = rows.to_table(SPEC)
    table.validate(full=True)
    buffer = table.column("entry_ids").chunk(0).values.buffers()[1]
    assert buffer.address == rows.entry_ids.ctypes.data
    chunked = pa.concat_tables([table.slice(0, 2), table.slice(2, 0), table.slice(2)])
    assert chunked.column("entry_ids").num_chunks > 1
    assert LabelRows.from_table(chunked, SPEC).to_table(SPEC).equals(table)
    part = LabelRows.from_table(table.slice(3, 4), SPEC)
    validate(part, SPEC, VOCAB)
    assert part.to_table(SPEC).equals(table.slice(3, 4))


def test_from_table_refuses_what_is_not_the_record() -> None:
    table = make_rows(4, SPEC, VOCAB).to_table(SPEC)
    with pytest.raises(RecordError, match="lacks token_ids"):
        LabelRows.from_table(table.drop_columns(["token_ids"]), SPEC)
    wide = table.column("target_rank").cast(pa.list_(pa.int64()))
    at = table.schema.get_field_index("target_rank")
    with pytest.raises(RecordError, match="target_rank has type"):
        LabelRows.from_table(table.set_column(at, "target_rank", wide), SPEC)
    slid = pa.chunked_array([table.column("target_rank").combine_chunks().take([1, 0, 2, 3])])
    moved = table.set_column(at, table.schema.field(at), slid)
    with pytest.raises(RecordError, match=r"target_rank: list lengths do not match .* expected N"):
        LabelRows.from_table(moved, SPEC)


def test_take_slice_and_concat_agree() -> None:
    rows = make_rows(8, SPEC, VOCAB)
    table = rows.to_table(SPEC)
    assert rows.take(np.array([5, 0, 5])).to_table(SPEC).equals(table.take([5, 0, 5]))
    assert rows.slice(2, 5).to_table(SPEC).equals(table.slice(2, 3))
    assert len(rows.slice(5, 2)) == 0
    again = LabelRows.concat([rows.slice(0, 3), rows.slice(3, 3), rows.slice(3, 8)])
    assert again.to_table(SPEC).equals(table)
    with pytest.raises(RecordError, match="entropy is missing in 1 of 2"):
        LabelRows.concat([rows, replace(rows, entropy=None)])
    with pytest.raises(RecordError, match="no rows"):
        LabelRows.concat([])


@pytest.mark.parametrize("num_rows", [0, 1, 40])
@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        RecordSpec(kind="topk", k=VOCAB + 5),
        RecordSpec(kind="topk", k=1, entropy=False, logprob_bits=3),
        RecordSpec(kind="topp"),
        RecordSpec(kind="topp", top_p=1.0, max_head=9, logprob_bits=2),
        RecordSpec(kind="threshold"),
        RecordSpec(kind="threshold", tau=0.3, temperatures=(2.0, 3.0), logprob_bits=2),
        RecordSpec(kind="threshold", temperatures=(0.5,), draw_temperature=0.5),
        RecordSpec(kind="sampled"),
        RecordSpec(kind="sampled", draws=3, temperatures=(2.0,)),
        RecordSpec(kind="tokens"),
        RecordSpec(kind="tokens", teacher_context=True),
    ],
)
def test_valid_rows_pass(spec: RecordSpec, num_rows: int) -> None:
    for scale in (0.0, 4.0, 500.0):
        validate(make_rows(num_rows, spec, VOCAB, scale=scale), spec, VOCAB)


def with_value(name: str, at: int, value: float) -> Callable[[LabelRows], LabelRows]:
    def change(rows: LabelRows) -> LabelRows:
        values = getattr(rows, name).copy()
        values.reshape(-1)[at] = value
        # The offsets stay those of the valid rows.
        return replace(rows, **{name: values})

    return change


def shorter(name: str) -> Callable[[LabelRows], LabelRows]:
    return lambda rows: replace(rows, **{name: getattr(rows, name)[:-1]})


def shifted_labels(rows: LabelRows) -> LabelRows:
    """Every label describes the next token: the mistake that trains on noise."""
    return replace(
        rows,
        entry_ids=np.roll(rows.entry_ids, SPEC.k),
        entry_logprobs=np.roll(rows.entry_logprobs, SPEC.k),
        tail_logmass=np.roll(rows.tail_logmass, 1),
    )


def swapped_entries(rows: LabelRows) -> LabelRows:
    logprobs = rows.entry_logprobs.copy()
    logprobs[12:14] = logprobs[12:14][::-1]
    return replace(rows, entry_logprobs=logprobs)


LABEL_RULES: list[tuple[Callable[[LabelRows], LabelRows], str]] = [
    (with_value("token_ids", 3, VOCAB), r"row 0, value 3, column token_ids: found 50; .*\[0, 50\)"),
    (with_value("token_ids", 3, -1), r"row 0, value 3, column token_ids: found -1"),
    (with_value("label_spans", 0, 0), r"row 0, value 0, column label_spans: found 0"),
    (with_value("label_spans", 1, 99), r"label_spans"),
    (with_value("label_spans", 1, 1), r"label_spans"),
    (with_value("teacher_context", 0, VOCAB), r"column teacher_context: found 50"),
    (with_value("head_len", 7, 5), r"position \d+, column head_len: found 5; expected 6"),
    (with_value("tail_len", 7, 1), r"column tail_len: found 1; expected 0"),
    (with_value("entry_ids", 6 * 5 + 2, VOCAB), r"row 0, position 5, column entry_ids"),
    (with_value("entry_ids", 6 * 5 + 2, -7), r"row 0, position 5, column entry_ids"),
    (with_value("entry_logprobs", 8, np.nan), r"row 0, position 1, column entry_logprobs.*finite"),
    (with_value("entry_logprobs", 8, -np.inf), r"row 0, position 1, column entry_logprobs.*finite"),
    (with_value("entry_logprobs", 6, 0.5), r"row 0, position 1, column entry_logprobs.*positive"),
    (with_value("entry_logprobs", 6, -0.0), r"position 1, column entry_logprobs.*probability of 1"),
    (with_value("tail_logmass", 4, -np.inf), r"row 0, position 4, column tail_logmass"),
    (with_value("tail_logmass", 4, 0.25), r"row 0, position 4, column tail_logmass"),
    (with_value("tail_logmass", 4, -0.0), r"position 4, column entry_logprobs.*probability of 1"),
    (with_value("target_logprob", 2, np.nan), r"row 0, position 2, column target_logprob"),
    (with_value("target_logprob", 2, -0.0), r"row 0, position 2, column target_logprob"),
    (with_value("target_rank", 2, 0), r"row 0, position 2, column target_rank: found 0"),
    (with_value("target_rank", 2, VOCAB + 1), r"row 0, position 2, column target_rank"),
    (with_value("entropy", 1, -0.5), r"row 0, position 1, column entropy"),
    (with_value("entropy", 1, 9.0), r"row 0, position 1, column entropy"),
    (with_value("lse", 3, np.inf), r"row 0, position 1, column lse"),
    (with_value("token_offsets", 1, 10**6), r"token_offsets: expected values rising"),
    (with_value("label_offsets", 1, 3), r"label_offsets: expected the number of positions"),
    (with_value("entry_offsets", 1, 7), r"entry_offsets: expected the running sum"),
    (shorter("entry_ids"), r"column entry_ids has shape"),
    (shorter("target_rank"), r"column target_rank has shape"),
    (shorter("lse"), r"column lse has shape"),
    (lambda rows: replace(rows, entropy=None), r"column entropy is missing"),
    (lambda rows: replace(rows, entry_counts=np.zeros(3, np.uint8)), r"entry_counts is present"),
    (lambda rows: replace(rows, row_key=rows.row_key[:, :8]), r"row_key has shape"),
    (
        lambda rows: replace(rows, target_rank=rows.target_rank.astype(np.int64)),
        r"target_rank has dtype int64; expected int32",
    ),
    (swapped_entries, r"row 0, position 2, column entry_logprobs.*decreasing"),
    (shifted_labels, r"row 0, position \d+, column target_logprob"),
]


@pytest.mark.parametrize(("change", "said"), LABEL_RULES)
def test_broken_rows_are_named(change: Callable[[LabelRows], LabelRows], said: str) -> None:
    rows = make_rows(12, SPEC, VOCAB, seed=3, min_tokens=12)
    validate(rows, SPEC, VOCAB)
    with pytest.raises(RecordError, match=said) as caught:
        validate(change(rows), SPEC, VOCAB, where="shard 7")
    assert str(caught.value).startswith("shard 7: ")


def test_repeated_id_is_named() -> None:
    rows = make_rows(5, SPEC, VOCAB, min_tokens=12)
    ids = rows.entry_ids.copy()
    ids[6 * 4 + 5] = ids[6 * 4]
    with pytest.raises(RecordError, match=r"row 0, position 4, column entry_ids.*each id once"):
        validate(replace(rows, entry_ids=ids), SPEC, VOCAB)


def test_place_is_counted_within_the_row() -> None:
    rows = make_rows(12, SPEC, VOCAB, min_tokens=12)
    at = int(rows.label_offsets[8]) + 3
    with pytest.raises(RecordError, match=r"row 8, position 3, column target_rank: found 0"):
        validate(with_value("target_rank", at, 0)(rows), SPEC, VOCAB)


@pytest.mark.parametrize(
    ("spans", "offsets", "said"),
    [
        ([1, 3, 3, 9], [0, 4], None),
        ([1, 3, 2, 9], [0, 4], "value 2, column label_spans: found 2"),
        ([3, 3], [0, 2], "value 1, column label_spans: found 3"),
        ([1, 11], [0, 2], "value 1, column label_spans: found 11"),
        ([1, 3, 4, 5], [0, 3], "span_offsets"),
    ],
)
def test_span_rules(spans: list[int], offsets: list[int], said: str | None) -> None:
    spec = RecordSpec(kind="tokens")
    key = np.zeros((1, 16), np.uint8)
    rows = LabelRows(
        row_key=key,
        content_key=key,
        token_ids=np.arange(10, dtype=np.int32),
        token_offsets=np.array([0, 10]),
        label_spans=np.array(spans, np.int32),
        span_offsets=np.array(offsets),
    )
    if said is None:
        validate(rows, spec, VOCAB)
    else:
        with pytest.raises(RecordError, match=said):
            validate(rows, spec, VOCAB)


class TestRounding:
    @pytest.mark.parametrize("bits", range(1, 11))
    def test_is_the_nearest_with_so_many_bits(self, bits: int) -> None:
        rng = np.random.default_rng(bits)
        x = -np.exp(rng.uniform(-9, 10, 20_000)).astype(np.float32)
        rounded = round_logprobs(x, bits)
        assert rounded.dtype == np.float16
        assert not (rounded.view(np.uint16) & ((1 << (10 - bits)) - 1)).any()
        error = np.abs(rounded.astype(np.float64) - x) / np.abs(x)
        assert error.max() <= 2.0 ** -(bits + 1)

    def test_ten_bits_is_plain_float16(self) -> None:
        x = np.linspace(-50, 0, 10_001, dtype=np.float32)
        np.testing.assert_array_equal(round_logprobs(x, 10), x.astype(np.float16))

    def test_all_halves_and_what_is_between_them(self) -> None:
        halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
        halves = halves[np.isfinite(halves)].astype(np.float64)
        x = np.concatenate([halves, (halves[:-1] + halves[1:]) / 2]).astype(np.float32)
        np.testing.assert_array_equal(round_logprobs(x, 10), x.astype(np.float16))

    def test_ties_go_to_even_and_large_numbers_to_infinity(self) -> None:
        x = np.array([-1.0625, -1.1875, -2.125, 65519.0, 65520.0, 1e30], np.float32)
        expected = np.array([-1.0, -1.25, -2.0, 65504.0, np.inf, np.inf], np.float16)
        np.testing.assert_array_equal(round_logprobs(x[:3], 3), expected[:3])
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(round_logprobs(x[3:], 10), expected[3:])

    def test_a_matrix_with_gaps_into_its_place(self) -> None:
        x = np.random.default_rng(0).normal(-8, 4, (5000, 20)).astype(np.float32)[:, 3:17]
        place = np.zeros(x.shape, np.float16)
        assert np.shares_memory(round_logprobs(x, 6, place), place)
        np.testing.assert_array_equal(place, round_logprobs(x.copy(), 6))

    @pytest.mark.parametrize("bits", [1, 4, 10])
    def test_ends(self, bits: int) -> None:
        x = np.array([[0.0, -0.0, -np.inf, -1e30, np.nan, 1.0]], np.float32)
        out = round_logprobs(x, bits)
        assert out.shape == x.shape
        assert (out[0, :2] == 0).all()
        assert (out[0, 2:4] >= LOWEST_LOGPROB).all()
        assert (np.exp(out[0, 2:4].astype(np.float64)) == 0).all()
        assert np.isnan(out[0, 4])
        assert out[0, 5] == 1.0

    def test_order_is_kept(self) -> None:
        x = np.sort(np.random.default_rng(0).normal(-8, 4, 5000).astype(np.float32))
        for bits in (2, 5, 10):
            assert (np.diff(round_logprobs(x, bits).astype(np.float32)) >= 0).all()

    def test_one_number(self) -> None:
        out: Any = round_logprobs(np.float32(-1.25), 2)
        assert out == np.float16(-1.25)
