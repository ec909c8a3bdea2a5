"""A shard is plain Parquet: DuckDB, Polars, pandas and HF datasets read every column of it.

DuckDB 2.0 is the stated minimum; see the encodings in ``schemas/shards.py``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from schemas.label_set import shards
from schemas.spec import RecordSpec
from schemas.storage.store import Store
from tests.support.label_rows import make_rows

VOCAB = 300
SPEC = RecordSpec(kind="topk", k=64, temperatures=(0.5, 2.0), teacher_context=True)


@pytest.fixture(scope="module")
def table_and_path(tmp_path_factory: pytest.TempPathFactory) -> tuple[pa.Table, Path]:
    folder = tmp_path_factory.mktemp("shard")
    rows = make_rows(40, SPEC, VOCAB, max_tokens=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "ROW_GROUP_BYTES", 2**17)
        info = shards.write_shard(Store(str(folder)), "a.parquet", rows, SPEC, "f", VOCAB)
    assert len(info.row_groups) > 1
    return rows.to_table(SPEC), folder / "a.parquet"


def read_duckdb(path: Path) -> dict[str, list[Any]]:
    import duckdb

    relation = duckdb.sql(f"SELECT * FROM read_parquet('{path}')")
    columns = zip(*relation.fetchall(), strict=True)
    return {
        name: [_plain(value) for value in column]
        for name, column in zip(relation.columns, columns, strict=True)
    }


def read_polars(path: Path) -> dict[str, list[Any]]:
    import polars

    return polars.read_parquet(path).to_dict(as_series=False)


def read_pandas(path: Path) -> dict[str, list[Any]]:
    import pandas

    frame = pandas.read_parquet(path)
    return {name: [_plain(value) for value in frame[name]] for name in frame.columns}


def read_datasets(path: Path) -> dict[str, list[Any]]:
    import datasets

    cache = str(path.parent / "cache")
    dataset = datasets.Dataset.from_parquet(str(path), cache_dir=cache)
    return {name: list(dataset[name]) for name in dataset.column_names}


@pytest.mark.parametrize("read", [read_duckdb, read_polars, read_pandas, read_datasets])
def test_other_readers_read_every_column(
    read: Callable[[Path], dict[str, list[Any]]], table_and_path: tuple[pa.Table, Path]
) -> None:
    table, path = table_and_path
    columns = read(path)
    assert list(columns) == list(SPEC.columns)
    for name in SPEC.columns:
        assert columns[name] == table.column(name).to_pylist(), name


def _plain(value: Any) -> Any:
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    return value.tolist() if hasattr(value, "tolist") else value
