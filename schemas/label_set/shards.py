"""Writes rows to Parquet shards and reads them back, with every byte verified.

Shards are plain Parquet without nulls, which any reader opens. Integers are stored as
BYTE_STREAM_SPLIT (DuckDB 2.0 or later), float16 as PLAIN (its only encoding that DuckDB reads).
Page checksums are written and verified on reading; without them flipped bits would go unnoticed.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from schemas.config import StrictModel
from schemas.errors import DamagedError, MissingError, RecordError, first_line
from schemas.fault_points import fault_point
from schemas.label_set.manifest import repair, unit_of_shard
from schemas.record.columns import COLUMNS, Length, arrow_schema
from schemas.record.rows import LabelRows
from schemas.record.validate import validate
from schemas.spec import TOKEN_COLUMNS, RecordSpec
from schemas.storage.driver_errors import refuse_unreadable
from schemas.storage.local_files import HashingWriter
from schemas.storage.store import Store

ROW_GROUP_BYTES = 32 * 2**20
"""Size of a row group in memory, in bytes; about 8 to 16 MB on disk at K = 64."""

FINGERPRINT_KEY = b"tutelage.fingerprint"

PARQUET_ERRORS = (pa.ArrowException, OSError, ValueError, OverflowError)
"""Raised for damaged bytes and for failed reads; `refuse_unreadable` distinguishes them."""


class ShardInfo(StrictModel):
    """The part of a manifest that describes the shard; the defaults mean no shard."""

    shard: str = ""
    sha256: str = ""
    size_bytes: int = 0
    num_rows: int = 0
    num_tokens: int = 0
    num_labels: int = 0
    num_entries: int = 0
    row_groups: list[int] = Field(default_factory=list)


def write_shard(
    store: Store, rel: str, rows: LabelRows, record: RecordSpec, fingerprint: str, vocab_size: int
) -> ShardInfo:
    """Validates rows and durably writes them as one shard.

    Raises:
        RecordError: a row violates an invariant of the record.
        StoreError: the file cannot be written.
    """
    schema = arrow_schema(record)
    schema = schema.with_metadata({**schema.metadata, FINGERPRINT_KEY: fingerprint.encode()})
    sizes = []
    try:
        with store.open(rel, "wb") as file:
            sink = HashingWriter(file)
            target = pa.PythonFile(sink, "w")
            with pq.ParquetWriter(target, schema, **_parquet_options(record)) as writer:
                for group in _row_groups(rows):
                    validate(group, record, vocab_size, where=store.path(rel))
                    writer.write_table(group.to_table(record), row_group_size=len(group))
                    fault_point("shard_half_written")
                    sizes.append(len(group))
    except BaseException:
        store.delete(rel)
        raise
    fault_point("shard_written")
    store.sync(rel)
    fault_point("shard_synced")
    return ShardInfo(
        shard=rel,
        sha256=sink.sha256,
        size_bytes=sink.size_bytes,
        num_rows=len(rows),
        num_tokens=rows.num_tokens,
        num_labels=rows.num_labels,
        num_entries=rows.num_entries,
        row_groups=sizes,
    )


def read_row_group(
    store: Store, rel: str, index: int, record: RecordSpec, columns: Sequence[str] | None = None
) -> LabelRows:
    """Reads one row group of a shard on the calling thread, without Arrow's thread pool.

    Args:
        store: the label set's store.
        rel: path of the shard.
        index: index of the row group.
        record: the label set's record.
        columns: label columns to read; None: all. Tokens, spans and keys are always read.

    Raises:
        DamagedError: the bytes differ from those written; the message names shard, row group and
            repair.
        MissingError: the shard does not exist.
        StoreError: the store cannot be read now.
    """
    names = _columns(record, columns)
    try:
        with contextlib.ExitStack() as stack:
            # Given a local path, Arrow reads the file itself, without going through Python.
            source: Any = store.path(rel)
            if not store.is_local:
                source = stack.enter_context(store.open(rel))
            file = stack.enter_context(
                pq.ParquetFile(
                    source, page_checksum_verification=True, pre_buffer=not store.is_local
                )
            )
            problem = schema_problem(file.schema_arrow, record)
            if problem:
                raise RecordError(problem)
            if not 0 <= index < file.num_row_groups:
                raise RecordError(f"has {file.num_row_groups} row groups, number {index} requested")
            table = file.read_row_group(index, columns=names, use_threads=False)
            return LabelRows.from_table(table, record)
    except FileNotFoundError as error:
        raise MissingError(
            f"{store.path(rel)}: no such shard: its unit was dropped or the label set is "
            "incomplete; label the corpus again and rebuild the view"
        ) from error
    except PARQUET_ERRORS as error:
        refuse_unreadable(error, store.path(rel))
        unit_key = unit_of_shard(store, rel)
        advice = repair(store, unit_key) if unit_key else "no manifest names it; label again"
        raise DamagedError(
            f"{store.path(rel)}: damaged, row group {index}: {first_line(error)}; "
            f"unit {unit_key}: {advice}"
        ) from error


def schema_problem(found: pa.Schema, record: RecordSpec) -> str:
    """How a shard's schema differs from its label set's; empty if it does not."""
    expected = arrow_schema(record)
    if found.equals(expected):
        return ""
    if found.names != expected.names:
        return f"the schema has columns {found.names}, expected {expected.names}"
    differing = [field.name for field in expected if found.field(field.name) != field]
    return f"the schema has unexpected types in columns {differing}"


def _parquet_options(record: RecordSpec) -> dict[str, Any]:
    encodings = {}
    few_values = []
    for name in record.columns:
        column = COLUMNS[name]
        leaf = name if column.length is Length.ROW else f"{name}.list.element"
        if name in ("head_len", "tail_len"):
            few_values.append(leaf)
        elif pa.types.is_integer(column.value_type):
            encodings[leaf] = "BYTE_STREAM_SPLIT"
        else:
            encodings[leaf] = "PLAIN"
    return {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": few_values or False,
        "column_encoding": encodings,
        "write_statistics": False,
        "write_page_checksum": True,
    }


def _row_groups(rows: LabelRows) -> Iterator[LabelRows]:
    """Splits rows into groups of about ROW_GROUP_BYTES, by tokens, labels and entries."""
    values = (getattr(rows, name, None) for name in COLUMNS)
    num_bytes = sum(value.nbytes for value in values if isinstance(value, np.ndarray))
    num_groups = max(1, round(num_bytes / ROW_GROUP_BYTES))
    weight = rows.token_offsets + rows.label_offsets
    if rows.entry_offsets is not None:
        weight = weight + rows.entry_offsets[rows.label_offsets]
    marks = weight[-1] * np.arange(1, num_groups) // num_groups
    cuts = np.unique(np.searchsorted(weight, marks))
    edges = [0, *(int(cut) for cut in cuts if 0 < cut < len(rows)), len(rows)]
    for start, stop in itertools.pairwise(edges):
        yield rows.slice(start, stop)


def _columns(record: RecordSpec, columns: Sequence[str] | None) -> list[str]:
    if columns is None:
        return list(record.columns)
    unknown = [name for name in columns if name not in record.columns]
    if unknown:
        raise RecordError(f"no column {unknown[0]} in this label set; it has {record.columns}")
    return [name for name in record.columns if name in columns or name in TOKEN_COLUMNS]
