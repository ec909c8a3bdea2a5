"""The small tables beside the shards: row keys of units, quarantine, and the index made of them."""

import io
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import DamagedError, MissingError, first_line
from schemas.keys import Keys, as_strings
from schemas.label_set.manifest import repair
from schemas.record.rows import LabelRows
from schemas.storage.store import Store


def _required(name: str, value_type: pa.DataType) -> pa.Field:
    return pa.field(name, value_type, nullable=False)


_KEY = _required("row_key", pa.binary(16))
_PLACE = [_required("source", pa.string()), _required("place", pa.int64())]
_ROW = [
    _required("row_group", pa.int32()),
    _required("row", pa.int32()),
    _required("num_tokens", pa.int32()),
    _required("num_labels", pa.int32()),
]
NAMES = pa.dictionary(pa.int32(), pa.string())
"""Names that repeat in most rows: shards, units."""

KEYS = pa.schema([_KEY, *_ROW])
INDEX = pa.schema([_KEY, _required("unit_key", NAMES), _required("shard", NAMES), *_ROW])
QUARANTINE = pa.schema(
    [
        _KEY,
        *_PLACE,
        _required("window", pa.int32()),
        _required("reason", pa.string()),
        _required("detail", pa.string()),
    ]
)


@dataclass(frozen=True)
class QuarantineRow:
    """One row that could not be labelled.

    Attributes:
        row_key: 16 bytes; the place key where the row has no tokens.
        source: name of the source, as rosters have it.
        place: row number in the source; byte offset of the line for JSONL.
        window: which window of the row.
        reason: one word, to count by.
        detail: a line for people.
    """

    row_key: bytes
    source: str
    place: int
    window: int
    reason: str
    detail: str


def unit_keys_table(rows: LabelRows, row_groups: Sequence[int]) -> pa.Table:
    """KEYS of rows that were written in row groups of the given sizes."""
    sizes = np.asarray(row_groups, np.int64)
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    buffer = pa.py_buffer(np.ascontiguousarray(rows.row_key))
    columns = [
        pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(rows), [None, buffer]),
        np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
        (np.arange(len(rows)) - starts).astype(np.int32),
        np.diff(rows.token_offsets).astype(np.int32),
        np.diff(rows.label_offsets).astype(np.int32),
    ]
    return pa.Table.from_arrays([pa.array(column) for column in columns], schema=KEYS)


def quarantine_table(rows: Sequence[QuarantineRow]) -> pa.Table:
    """QUARANTINE of the given rows."""
    names = [field.name for field in fields(QuarantineRow)]
    values = zip(*(astuple(row) for row in rows), strict=True)
    columns = dict(zip(names, values, strict=True))
    return pa.table({name: list(column) for name, column in columns.items()}, schema=QUARANTINE)


def key_array(table: pa.Table, column: str) -> Keys:
    """uint8 [R, 16] of a column of keys."""
    keys = table.column(column).combine_chunks()
    if not len(keys):
        return np.empty((0, 16), np.uint8)
    raw = np.frombuffer(keys.buffers()[1], np.uint8)
    return raw[keys.offset * 16 : (keys.offset + len(keys)) * 16].reshape(-1, 16)


def first_of_each_key(table: pa.Table) -> pa.Table:
    """The first row of each row key, in the order that they have."""
    first = first_occurrences(key_array(table, "row_key"))
    return table if first.all() else table.filter(pa.array(first))


def first_occurrences(keys: Keys) -> npt.NDArray[np.bool_]:
    """bool [R]: which of `keys`, uint8 [R, 16], have not come before."""
    first = np.zeros(len(keys), bool)
    first[np.unique(as_strings(keys), return_index=True)[1]] = True
    return first


def table_bytes(table: pa.Table) -> bytes:
    """A small table as a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def parse_table(data: bytes, schema: pa.Schema) -> pa.Table:
    """The small table in a Parquet file, every page checked.

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
    """A small table of a unit, which has to have the number of rows that its manifest says.

    Raises:
        DamagedError: it is not there, is damaged, or has another schema or number of rows.
    """
    try:
        table = parse_table(store.read_bytes(rel), schema)
        if len(table) != num_rows:
            raise DamagedError(f"holds {len(table)} rows, the manifest says {num_rows}")
    except (MissingError, DamagedError) as error:
        raise DamagedError(f"{store.path(rel)}: {error}; {repair(store, unit_key)}") from error
    return table
