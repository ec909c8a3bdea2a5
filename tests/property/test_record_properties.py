"""What holds of the record for any rows: round trips, cuts, validation, keys."""

import tempfile
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import RecordError
from schemas.keys import contains, find_keys, keys_to_sorted
from schemas.label_set import shards
from schemas.label_set.shards import read_row_group, write_shard
from schemas.record import LabelRows, round_logprobs, target_positions, validate
from schemas.spec import RecordSpec
from schemas.storage.store import Store
from tests.support.label_rows import make_rows

VOCAB = 40

steady = settings(deadline=None)  # other work on the machine is no failure

columns = {
    "temperatures": st.sampled_from([(), (2.0,), (0.5, 1.5, 4.0)]),
    "entropy": st.booleans(),
    "logprob_bits": st.integers(2, 10),
    "teacher_context": st.booleans(),
}
draws = {"draw_seed": st.integers(0, 2**64 - 1), **columns}
specs = st.one_of(
    st.builds(RecordSpec, kind=st.just("topk"), k=st.integers(1, VOCAB + 3), **columns),
    st.builds(
        RecordSpec,
        kind=st.just("topp"),
        top_p=st.floats(0.01, 1.0),
        max_head=st.integers(1, VOCAB + 3),
        **columns,
    ),
    st.builds(RecordSpec, kind=st.just("threshold"), tau=st.floats(1e-3, 0.999), **draws),
    st.builds(RecordSpec, kind=st.just("sampled"), draws=st.integers(1, 255), **draws),
    st.builds(RecordSpec, kind=st.just("tokens"), **columns),
)
seeds = st.integers(0, 2**32 - 1)


@steady
@given(spec=specs, num_rows=st.integers(0, 12), seed=seeds, scale=st.floats(0, 60))
def test_arrow_round_trip(spec: RecordSpec, num_rows: int, seed: int, scale: float) -> None:
    rows = make_rows(num_rows, spec, VOCAB, seed, scale=scale)
    validate(rows, spec, VOCAB)
    table = rows.to_table(spec)
    table.validate(full=True)
    again = LabelRows.from_table(table, spec)
    validate(again, spec, VOCAB)
    assert again.to_table(spec).equals(table)


@steady
@given(spec=specs, seed=seeds, cuts=st.lists(st.integers(0, 9), max_size=4))
def test_any_cut_joins_again(spec: RecordSpec, seed: int, cuts: list[int]) -> None:
    rows = make_rows(9, spec, VOCAB, seed)
    edges = [0, *sorted(cuts), 9]
    parts = [rows.slice(a, b) for a, b in pairwise(edges)]
    for part in parts:
        validate(part, spec, VOCAB)
    assert LabelRows.concat(parts).to_table(spec).equals(rows.to_table(spec))


@steady
@given(spec=specs, seed=seeds, indices=st.lists(st.integers(0, 7), max_size=12))
def test_take_is_that_of_arrow(spec: RecordSpec, seed: int, indices: list[int]) -> None:
    rows = make_rows(8, spec, VOCAB, seed)
    taken = rows.take(np.array(indices, np.int64))
    validate(taken, spec, VOCAB)
    assert taken.to_table(spec).equals(rows.to_table(spec).take(pa.array(indices, pa.int64())))


@settings(steady, max_examples=25)
@given(spec=specs, seed=seeds, group_bytes=st.integers(200, 20_000))
def test_shard_round_trip(spec: RecordSpec, seed: int, group_bytes: int) -> None:
    rows = make_rows(10, spec, VOCAB, seed)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "ROW_GROUP_BYTES", group_bytes)
        store = Store(folder)
        info = write_shard(store, "a.parquet", rows, spec, "f", VOCAB)
        start = 0
        for index, size in enumerate(info.row_groups):
            group = read_row_group(store, "a.parquet", index, spec)
            assert group.to_table(spec).equals(rows.slice(start, start + size).to_table(spec))
            start += size
        assert start == 10


@steady
@given(seed=seeds, k=st.integers(2, 12), data=st.data())
def test_any_change_of_a_head_id_to_a_repeated_one_is_found(
    seed: int, k: int, data: st.DataObject
) -> None:
    spec = RecordSpec(kind="topk", k=k)
    rows = make_rows(6, spec, VOCAB, seed)
    position = data.draw(st.integers(0, rows.num_labels - 1))
    a, b = data.draw(st.permutations(range(k)))[:2]
    ids = rows.entry_ids.copy()
    ids[position * k + a] = ids[position * k + b]
    with pytest.raises(RecordError):
        validate(replace(rows, entry_ids=ids), spec, VOCAB)


@steady
@given(seed=seeds, shift=st.integers(1, 5))
def test_labels_that_are_off_by_some_positions_are_found(seed: int, shift: int) -> None:
    """A teacher that is sure of different tokens at different places cannot be slid along."""
    spec = RecordSpec(kind="topk", k=4, logprob_bits=10)
    rows = make_rows(6, spec, VOCAB, seed, min_tokens=20)
    slid = replace(
        rows,
        entry_ids=np.roll(rows.entry_ids, shift * 4),
        entry_logprobs=np.roll(rows.entry_logprobs, shift * 4),
        tail_logmass=np.roll(rows.tail_logmass, shift),
    )
    with pytest.raises(RecordError):
        validate(slid, spec, VOCAB)


@steady
@given(
    bits=st.integers(1, 10),
    values=st.lists(st.floats(-60_000, 0, width=32), min_size=2, max_size=50),
)
def test_rounding_keeps_order_and_is_stable(bits: int, values: list[float]) -> None:
    x = np.sort(np.array(values, np.float32))
    once = round_logprobs(x, bits)
    assert (np.diff(once.astype(np.float32)) >= 0).all()
    assert np.isfinite(once).all()
    assert (once <= 0).all()
    np.testing.assert_array_equal(round_logprobs(once.astype(np.float32), bits), once)


@steady
@given(seed=seeds, num_rows=st.integers(0, 20))
def test_spans_expand_to_their_positions(seed: int, num_rows: int) -> None:
    rows = make_rows(num_rows, RecordSpec(kind="tokens"), VOCAB, seed)
    indices, offsets = target_positions(rows.label_spans, rows.span_offsets)
    expected = []
    for row in range(num_rows):
        flat = rows.label_spans[rows.span_offsets[row] : rows.span_offsets[row + 1]]
        pairs = flat.reshape(-1, 2).tolist()
        expected.append([t for start, end in pairs for t in range(start, end)])
    assert indices.tolist() == [t for row in expected for t in row]
    assert np.diff(offsets).tolist() == [len(row) for row in expected]


@steady
@given(
    mine=st.lists(st.binary(min_size=16, max_size=16), unique=True, max_size=30),
    asked=st.lists(st.binary(min_size=16, max_size=16), max_size=10),
)
def test_membership_is_that_of_a_set(mine: list[bytes], asked: list[bytes]) -> None:
    asked = asked + mine[::3]
    keys = np.frombuffer(b"".join(mine), np.uint8).reshape(-1, 16)
    wanted = np.frombuffer(b"".join(asked), np.uint8).reshape(-1, 16)
    expected = [key in set(mine) for key in asked]
    assert contains(keys_to_sorted(keys), wanted).tolist() == expected
    places = find_keys(keys, wanted)
    assert [mine[place] if place >= 0 else None for place in places] == [
        key if there else None for key, there in zip(asked, expected, strict=True)
    ]
