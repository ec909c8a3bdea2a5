"""Rows to Parquet and back, every byte checked.

Plain Parquet that any reader opens. Nothing is nullable. Integers are stored BYTE_STREAM_SPLIT,
which DuckDB reads from 2.0 on; float16 is stored PLAIN, because DuckDB reads no other encoding of
it. Page checksums are written, and verified on reading, without which flipped bytes come back
silently.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.config import StrictModel
from schemas.errors import DamagedError, MissingError, RecordError, first_line
from schemas.fault_points import fault_point
from schemas.label_set.manifest import repair, unit_of_shard
from schemas.record.columns import COLUMNS, Length, arrow_schema
from schemas.record.rows import LabelRows
from schemas.record.validate import validate
from schemas.spec import TOKEN_COLUMNS, RecordSpec
from schemas.storage.driver_errors import refuse_unreadable
from schemas.storage.local_files import HashingWriter, digest_stream
from schemas.storage.store import Store

T = TypeVar("T")

ROW_GROUP_BYTES = 32 * 2**20
"""Bytes in memory that become one row group: about 8 to 16 MB on disk at K = 64."""

FINGERPRINT_KEY = b"tutelage.fingerprint"


class ShardInfo(StrictModel):
    """What was written; all of it goes into the manifest.

    Attributes:
        path: of the shard in its store.
        row_groups: rows of each row group.
    """

    path: str
    sha256: str
    size_bytes: int
    num_rows: int
    num_tokens: int
    num_labels: int
    num_entries: int
    row_groups: list[int]


NO_SHARD = ShardInfo(
    path="",
    sha256="",
    size_bytes=0,
    num_rows=0,
    num_tokens=0,
    num_labels=0,
    num_entries=0,
    row_groups=[],
)
"""Of a unit that has quarantined rows only."""


def write_shard(
    store: Store,
    rel: str,
    rows: LabelRows | Iterable[LabelRows],
    spec: RecordSpec,
    fingerprint: str,
    vocab_size: int,
) -> ShardInfo:
    """Checks rows and writes them as one shard, which is on the disk when this returns.

    Raises:
        RecordError: the rows break an invariant of the record.
        StoreError: the file cannot be written.
    """
    batches = [rows] if isinstance(rows, LabelRows) else rows
    schema = arrow_schema(spec)
    schema = schema.with_metadata({**schema.metadata, FINGERPRINT_KEY: fingerprint.encode()})
    sizes: list[tuple[int, int, int, int]] = []
    try:
        with store.open(rel, "wb") as file:
            sink = HashingWriter(file)
            target = pa.PythonFile(sink, "w")
            with pq.ParquetWriter(target, schema, **_parquet_options(spec)) as writer:
                for group in _row_groups(batches):
                    validate(group, spec, vocab_size, where=store.path(rel))
                    writer.write_table(group.to_table(spec), row_group_size=len(group))
                    fault_point("shard_half_written")
                    sizes.append(
                        (len(group), group.num_tokens, group.num_labels, group.num_entries)
                    )
    except BaseException:
        store.delete(rel)
        raise
    fault_point("shard_written")
    store.sync(rel)
    fault_point("shard_synced")
    return ShardInfo(
        path=rel,
        sha256=sink.sha256,
        size_bytes=sink.size_bytes,
        num_rows=sum(size[0] for size in sizes),
        num_tokens=sum(size[1] for size in sizes),
        num_labels=sum(size[2] for size in sizes),
        num_entries=sum(size[3] for size in sizes),
        row_groups=[size[0] for size in sizes],
    )


def read_row_group(
    store: Store,
    rel: str,
    index: int,
    spec: RecordSpec,
    columns: Sequence[str] | None = None,
) -> LabelRows:
    """One row group of a shard, on the calling thread alone.

    Args:
        store: of the label set.
        rel: the shard.
        index: which row group, from 0.
        spec: of the label set.
        columns: columns of labels to read; None: all of them. Tokens, spans and keys always come.

    Raises:
        DamagedError: the bytes are not those that were written; names shard, row group and repair.
        MissingError: the shard is not there.
        StoreError: the store does not give it now.
    """
    wanted = _columns(spec, columns)

    def read(file: pq.ParquetFile) -> LabelRows:
        _check_schema(file, spec)
        if not 0 <= index < file.num_row_groups:
            raise RecordError(f"found {file.num_row_groups} row groups, wanted number {index}")
        return _decode(file, index, spec, wanted)

    return _reading(store, rel, f"row group {index}", read)


def read_shard(
    store: Store,
    rel: str,
    spec: RecordSpec,
    columns: Sequence[str] | None = None,
    sha256: str | None = None,
) -> LabelRows:
    """All rows of a shard, in order; as `read_row_group`, and by its digest too where it is given.

    Raises:
        DamagedError: the bytes are not those that were written; names shard, row group and repair.
        MissingError: the shard is not there.
        StoreError: the store does not give it now.
    """
    if sha256 is not None:
        check_digest(store, rel, sha256)
    wanted = _columns(spec, columns)

    def count(file: pq.ParquetFile) -> int:
        _check_schema(file, spec)
        return int(file.num_row_groups)

    num_groups = _reading(store, rel, "the footer", count)
    if num_groups == 0:
        return LabelRows.from_table(arrow_schema(spec).empty_table(), spec)
    return LabelRows.concat(
        [read_row_group(store, rel, index, spec, wanted) for index in range(num_groups)]
    )


def check_digest(store: Store, rel: str, sha256: str) -> None:
    """Reads the whole file and compares its digest.

    Raises:
        DamagedError: it differs.
        MissingError: the file is not there.
    """
    with store.open(rel) as file:
        found, _ = digest_stream(file)
    if found != sha256:
        raise _damaged(store, rel, f"sha256 is {found}, the manifest says {sha256}")


def _parquet_options(spec: RecordSpec) -> dict[str, Any]:
    encodings = {}
    few_values = []
    for name in spec.columns:
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


def _row_groups(batches: Iterable[LabelRows]) -> Iterator[LabelRows]:
    """The rows cut where they have about ROW_GROUP_BYTES, into parts of about equal size."""
    waiting: list[LabelRows] = []
    waiting_bytes = 0
    for batch in batches:
        if len(batch):
            waiting.append(batch)
            waiting_bytes += _num_bytes(batch)
        if waiting_bytes >= 2 * ROW_GROUP_BYTES:
            yield from _split(LabelRows.concat(waiting))
            waiting, waiting_bytes = [], 0
    if waiting:
        yield from _split(waiting[0] if len(waiting) == 1 else LabelRows.concat(waiting))


def _split(rows: LabelRows) -> Iterator[LabelRows]:
    """Cuts by what the rows hold, in tokens, labels and entries, not by their number."""
    num_groups = max(1, round(_num_bytes(rows) / ROW_GROUP_BYTES))
    weight = rows.token_offsets + rows.label_offsets
    if rows.entry_offsets is not None:
        weight = weight + rows.entry_offsets[rows.label_offsets]
    marks = weight[-1] * np.arange(1, num_groups) // num_groups
    cuts = np.unique(np.searchsorted(weight, marks))
    edges = [0, *(int(cut) for cut in cuts if 0 < cut < len(rows)), len(rows)]
    for start, stop in itertools.pairwise(edges):
        yield rows.slice(start, stop)


def _num_bytes(rows: LabelRows) -> int:
    values = (getattr(rows, name, None) for name in COLUMNS)
    return sum(value.nbytes for value in values if isinstance(value, np.ndarray))


def _columns(spec: RecordSpec, columns: Sequence[str] | None) -> list[str]:
    if columns is None:
        return list(spec.columns)
    unknown = [name for name in columns if name not in spec.columns]
    if unknown:
        raise RecordError(f"no column {unknown[0]} in this label set; it has {spec.columns}")
    return [name for name in spec.columns if name in columns or name in TOKEN_COLUMNS]


def _check_schema(file: pq.ParquetFile, spec: RecordSpec) -> None:
    found, expected = file.schema_arrow, arrow_schema(spec)
    if not found.equals(expected):
        names = [f.name for f in expected if f.name not in found.names or found.field(f.name) != f]
        raise RecordError(f"the schema differs from the label set's in {names or found.names}")


def _decode(file: pq.ParquetFile, index: int, spec: RecordSpec, columns: list[str]) -> LabelRows:
    table = file.read_row_group(index, columns=columns, use_threads=False)
    return LabelRows.from_table(table, spec)


def _reading(store: Store, rel: str, part: str, read: Callable[[pq.ParquetFile], T]) -> T:
    """Runs `read` on an open shard; bytes that make no sense to it become a DamagedError."""
    with contextlib.ExitStack() as stack:
        try:
            # A local path lets Arrow read on its own, without Python in between.
            source: Any = store.path(rel)
            if not store.is_local:
                source = stack.enter_context(store.open(rel))
            file = pq.ParquetFile(
                source, page_checksum_verification=True, pre_buffer=not store.is_local
            )
            return read(stack.enter_context(file))
        except FileNotFoundError as error:
            raise MissingError(
                f"{store.path(rel)}: there is no such shard, so its unit was dropped or the label "
                "set is not whole; label the corpus again and make the view anew"
            ) from error
        except (pa.ArrowException, OSError, RecordError, ValueError, OverflowError) as error:
            refuse_unreadable(error, store.path(rel))
            raise _damaged(store, rel, f"{part}: {first_line(error)}") from error


def _damaged(store: Store, rel: str, problem: str) -> DamagedError:
    unit_key = unit_of_shard(store, rel)
    advice = repair(store, unit_key) if unit_key else "no manifest names it; label again"
    return DamagedError(f"{store.path(rel)}: damaged, {problem}; unit {unit_key}: {advice}")
