"""Shards: what is written comes back, and nothing damaged comes back at all."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from schemas.errors import DamagedError, MissingError, RecordError, StoreError, TutelageError
from schemas.label_set import shards
from schemas.label_set.shards import read_row_group, write_shard
from schemas.spec import RecordSpec
from schemas.storage.store import Store
from tests.support.label_rows import make_rows
from tests.support.shards import read_shard

VOCAB = 60
SPEC = RecordSpec(kind="topk", k=8, temperatures=(2.0,), teacher_context=True)
REL = "shards/a.parquet"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 2000)


@pytest.mark.parametrize("spec", [SPEC, RecordSpec(), RecordSpec(kind="tokens")])
@pytest.mark.usefixtures("small_groups")
def test_round_trip(store: Store, spec: RecordSpec) -> None:
    rows = make_rows(90, spec, VOCAB)
    info = write_shard(store, REL, rows, spec, "f", VOCAB)
    got = read_shard(store, REL, spec, len(info.row_groups))
    assert got.to_table(spec).equals(rows.to_table(spec))
    assert (info.num_rows, info.num_tokens, info.num_labels) == (
        90, rows.num_tokens, rows.num_labels,
    )  # fmt: skip
    assert sum(info.row_groups) == 90
    assert len(info.row_groups) > 1
    start = sum(info.row_groups[:1])
    second = read_row_group(store, REL, 1, spec)
    expected = rows.slice(start, start + info.row_groups[1])
    assert second.to_table(spec).equals(expected.to_table(spec))
    data = Path(store.path(REL)).read_bytes()
    assert (info.size_bytes, info.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_round_trip_on_an_object_store() -> None:
    memory = Store("memory://shards-test")
    rows = make_rows(5, SPEC, VOCAB)
    info = write_shard(memory, REL, rows, SPEC, "f", VOCAB)
    assert hashlib.sha256(memory.read_bytes(REL)).hexdigest() == info.sha256
    assert read_shard(memory, REL, SPEC, 1).to_table(SPEC).equals(rows.to_table(SPEC))
    memory.delete("shards")


def test_columns_are_chosen(store: Store) -> None:
    rows = make_rows(6, SPEC, VOCAB)
    write_shard(store, REL, rows, SPEC, "f", VOCAB)
    got = read_row_group(store, REL, 0, SPEC, columns=["target_rank"])
    np.testing.assert_array_equal(got.target_rank, rows.target_rank)
    np.testing.assert_array_equal(got.token_ids, rows.token_ids)
    np.testing.assert_array_equal(got.label_offsets, rows.label_offsets)
    assert got.entry_ids is None
    only_entries = read_row_group(store, REL, 0, SPEC, columns=["entry_ids"])
    np.testing.assert_array_equal(only_entries.entry_ids, rows.entry_ids)
    with pytest.raises(RecordError, match="no column nothing in this label set"):
        read_row_group(store, REL, 0, SPEC, columns=["nothing"])


def test_shard_file_names_its_spec(store: Store) -> None:
    rows = make_rows(6, SPEC, VOCAB)
    write_shard(store, REL, rows, SPEC, "abcd", VOCAB)
    file = pq.ParquetFile(store.path(REL))
    assert file.schema_arrow.metadata[b"tutelage.fingerprint"] == b"abcd"
    assert file.schema_arrow.metadata[b"tutelage.schema_version"] == b"1"
    for column in range(file.metadata.num_columns):
        part = file.metadata.row_group(0).column(column)
        floats = "logical_type=Float16" in str(file.schema.column(column).logical_type)
        assert part.compression == "ZSTD"
        assert file.schema.column(column).max_definition_level <= 1
        if floats:
            assert "BYTE_STREAM_SPLIT" not in part.encodings


def test_invalid_rows_leave_no_file(store: Store) -> None:
    rows = make_rows(6, SPEC, VOCAB)
    with pytest.raises(RecordError, match=r"a\.parquet: row 0, value \d+, column token_ids"):
        write_shard(store, REL, rows, SPEC, "f", vocab_size=3)
    assert not store.exists(REL)


def test_missing_shard_says_why(store: Store) -> None:
    with pytest.raises(StoreError, match="no such shard: its unit was dropped") as caught:
        read_row_group(store, REL, 0, SPEC)
    assert not isinstance(caught.value, DamagedError)


@pytest.mark.parametrize("kept", [0, 3, 100, -1, -9, -200])
def test_truncated_shard_is_found(store: Store, kept: int) -> None:
    write_shard(store, REL, make_rows(6, SPEC, VOCAB), SPEC, "f", VOCAB)
    path = Path(store.path(REL))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DamagedError, match=r"a\.parquet: damaged, row group 0"):
        read_row_group(store, REL, 0, SPEC)


def test_row_group_that_is_not_there(store: Store) -> None:
    write_shard(store, REL, make_rows(6, SPEC, VOCAB), SPEC, "f", VOCAB)
    with pytest.raises(DamagedError, match="has 1 row groups, number 1 requested"):
        read_row_group(store, REL, 1, SPEC)


def test_shard_of_another_spec_is_found(store: Store) -> None:
    write_shard(store, REL, make_rows(6, SPEC, VOCAB), SPEC, "f", VOCAB)
    with pytest.raises(DamagedError, match="the schema has columns"):
        read_row_group(store, REL, 0, RecordSpec())


def test_unreadable_is_not_damaged(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Being out of file handles must not send anybody to drop labels."""
    write_shard(store, REL, make_rows(6, SPEC, VOCAB), SPEC, "f", VOCAB)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(pq, "ParquetFile", fail)
    with pytest.raises(StoreError, match=r"cannot be read .*Too many open files") as caught:
        read_row_group(store, REL, 0, SPEC)
    assert not isinstance(caught.value, DamagedError)


PASSING = [
    (PermissionError("Access Denied"), r"\(Access Denied\); check credentials"),
    (PermissionError(), r"\(PermissionError\); check credentials"),
    (ConnectionResetError("reset by peer"), r"\(reset by peer\); this may be temporary"),
    (TimeoutError(), r"\(TimeoutError\); this may be temporary"),
    (OSError(5, "Input/output error\nand more"), r".*Input/output error\); this may be temporary"),
]


@pytest.mark.parametrize(("error", "told"), PASSING)
@pytest.mark.parametrize("url", ["", "memory://unreadable"])
def test_store_that_does_not_answer_is_no_damaged_shard(
    store: Store, url: str, error: OSError, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What s3fs makes of AccessDenied and ExpiredToken has no errno, as Arrow's damage has none."""
    store = Store(url) if url else store
    write_shard(store, REL, make_rows(6, SPEC, VOCAB), SPEC, "f", VOCAB)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", fail)
    with pytest.raises(StoreError, match=f"a.parquet: cannot be read {told}") as caught:
        read_row_group(store, REL, 0, SPEC)
    assert type(caught.value) is StoreError
    assert "drop" not in str(caught.value)


def test_store_that_failed_too_long_has_lost_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Store("memory://failing")

    def fail(*_: Any, **__: Any) -> None:
        raise StoreError("a.parquet: busy; tried again for 900s")

    monkeypatch.setattr(memory, "open", fail)
    with pytest.raises(StoreError, match=r"tried again for 900s$") as caught:
        read_row_group(memory, REL, 0, SPEC)
    assert not isinstance(caught.value, MissingError)
    with pytest.raises(MissingError, match="its unit was dropped"):
        read_row_group(store, REL, 0, SPEC)


def test_damage_without_words_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(store, REL, make_rows(6, SPEC, VOCAB), SPEC, "f", VOCAB)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", fail)
    with pytest.raises(DamagedError, match="damaged, row group 0: OSError"):
        read_row_group(store, REL, 0, SPEC)


@pytest.mark.usefixtures("small_groups")
def test_no_flipped_byte_goes_unnoticed(store: Store) -> None:
    """Any byte: what is read is an error or, for a byte that means nothing, the same rows."""
    rows = make_rows(10, SPEC, VOCAB)
    info = write_shard(store, REL, rows, SPEC, "f", VOCAB)
    expected = rows.to_table(SPEC)
    path = Path(store.path(REL))
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    places = [*rng.integers(0, footer, 300), *rng.integers(footer, len(whole), 150)]
    errors: list[TutelageError] = []
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(damaged)
        try:
            got = read_shard(store, REL, SPEC, len(info.row_groups))
        except TutelageError as error:
            errors.append(error)
        else:
            assert got.to_table(SPEC).equals(expected), f"byte {place} changed the labels"
    assert len(errors) > 250
    assert all(type(error) is DamagedError for error in errors)
    assert all("a.parquet: damaged" in str(error) for error in errors)
