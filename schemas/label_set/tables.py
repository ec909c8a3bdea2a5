"""Small tables: the row keys and the quarantine of each unit, and the index of a label set."""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import DamagedError, MissingError, first_line
from schemas.keys import Keys, as_strings
from schemas.label_set.manifest import repair
from schemas.record.key_columns import KEY_TYPE, key_column, key_values
from schemas.record.rows import LabelRows
from schemas.storage.store import Store


def required_fields(**types: pa.DataType) -> list[pa.Field]:
    """Fields without nulls, in the order given."""
    return [pa.field(name, value_type, nullable=False) for name, value_type in types.items()]


NAMES = pa.dictionary(pa.int32(), pa.string())
"""Arrow type of names repeated in most rows: shards, units."""

_ROW = required_fields(
    row_group=pa.int32(), row=pa.int32(), num_tokens=pa.int32(), num_labels=pa.int32()
)
KEYS = pa.schema([*required_fields(row_key=KEY_TYPE), *_ROW])
INDEX = pa.schema([*required_fields(row_key=KEY_TYPE, unit_key=NAMES, shard=NAMES), *_ROW])
QUARANTINE = pa.schema(
    required_fields(
        row_key=KEY_TYPE,
        source=pa.string(),
        place=pa.int64(),
        window=pa.int32(),
        reason=pa.string(),
        detail=pa.string(),
    )
)


@dataclass(frozen=True)
class QuarantineRow:
    """One row that could not be labelled.

    Attributes:
        row_key: 16 bytes; the place key if the row could not be tokenised.
        source: name of the source, as in rosters.
        place: row number in the source; for JSONL, byte offset of the line.
        window: index of the row's window.
        reason, detail: as in `schemas.errors.RowFailure`.
    """

    row_key: bytes
    source: str
    place: int
    window: int
    reason: str
    detail: str


def unit_keys_table(rows: LabelRows, row_groups: Sequence[int]) -> pa.Table:
    """The KEYS table of rows written in row groups of the given sizes."""
    sizes = np.asarray(row_groups, np.int64)
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    columns = [
        key_column(rows.row_key),
        np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
        (np.arange(len(rows)) - starts).astype(np.int32),
        np.diff(rows.token_offsets).astype(np.int32),
        np.diff(rows.label_offsets).astype(np.int32),
    ]
    return pa.Table.from_arrays([pa.array(column) for column in columns], schema=KEYS)


def quarantine_table(rows: Sequence[QuarantineRow]) -> pa.Table:
    """The QUARANTINE table of these rows."""
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=QUARANTINE)


def key_array(table: pa.Table, column: str) -> Keys:
    """uint8 [R, 16]: the values of a key column."""
    return key_values(table.column(column).combine_chunks())


def first_of_each_key(table: pa.Table) -> pa.Table:
    """Keeps the first row of each row key."""
    first = first_occurrences(key_array(table, "row_key"))
    return table if first.all() else table.filter(pa.array(first))


def first_occurrences(keys: Keys) -> npt.NDArray[np.bool_]:
    """bool [R]: which of `keys`, uint8 [R, 16], occur for the first time."""
    first = np.zeros(len(keys), bool)
    first[np.unique(as_strings(keys), return_index=True)[1]] = True
    return first


def table_bytes(table: pa.Table) -> bytes:
    """Serializes a small table to Parquet."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def parse_table(data: bytes, schema: pa.Schema) -> pa.Table:
    """Parses a small table from Parquet and verifies every page.

    Raises:
        DamagedError: it is damaged, or has another schema.
    """
    try:
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
            table = file.read(use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DamagedError(f"cannot be read: {first_line(error)}") from error
    if not table.schema.equals(schema):
        raise DamagedError(f"has columns {table.schema.names}, expected {schema.names}")
    return table


def read_table(store: Store, rel: str, schema: pa.Schema, num_rows: int, unit_key: str) -> pa.Table:
    """Reads a unit's small table and checks its number of rows against the manifest.

    Raises:
        DamagedError: it is missing, damaged, or has another schema or number of rows.
    """
    try:
        table = parse_table(store.read_bytes(rel), schema)
        if len(table) != num_rows:
            raise DamagedError(f"has {len(table)} rows, the manifest records {num_rows}")
    except (MissingError, DamagedError) as error:
        raise DamagedError(f"{store.path(rel)}: {error}; {repair(store, unit_key)}") from error
    return table
