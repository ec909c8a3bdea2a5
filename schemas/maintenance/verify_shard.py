"""One shard against its manifest and its key file: bytes, pages, schema, rows, invariants."""

from collections.abc import Iterator
from typing import IO, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import RecordError, first_line
from schemas.keys import content_key, row_key
from schemas.label_set.label_set import LabelSet
from schemas.label_set.manifest import Manifest
from schemas.label_set.shards import FINGERPRINT_KEY
from schemas.label_set.tables import key_array
from schemas.record.columns import arrow_schema
from schemas.record.rows import LabelRows
from schemas.record.validate import validate
from schemas.storage.driver_errors import refuse_unreadable
from schemas.storage.local_files import digest_stream

SHOWN_ROWS = 20
"""Broken rows of one row group that are named; the others are counted."""
WHOLE_BYTES = 256 * 2**20
"""Shards up to this size are read once, as a whole."""


class Report(Protocol):
    """Takes a problem of the unit; `place` is row_group, row, row_key, column."""

    def __call__(self, what: str, file: str, found: str, **place: object) -> None: ...


class ShardCheck:
    """Checks one shard to its end, whatever is found on the way."""

    def __init__(self, label_set: LabelSet, manifest: Manifest, keys: Any, report: Report) -> None:
        """Prepares.

        Args:
            label_set: the shard is of.
            manifest: of its unit.
            keys: table of the unit's key file, or None where that is damaged.
            report: is told of every problem.
        """
        self._store = label_set.store
        self._spec = label_set.spec
        self._fingerprint = label_set.fingerprint
        self._unit = manifest
        self._keys = keys
        self._report = report

    def run(self) -> None:
        """Reads all of the shard and reports what is wrong with it.

        Raises:
            StoreError: the store does not give it now, so nothing can be said about it.
        """
        rel = self._unit.shard
        try:
            with self._store.open(rel) as file:
                self._bytes(file)
        except FileNotFoundError:
            self._report("missing", rel, "there is no such shard, though the manifest names it")
        except OSError as error:
            refuse_unreadable(error, self._store.path(rel))
            self._report("bytes", rel, f"cannot be read ({first_line(error)})")

    def _bytes(self, file: IO[bytes]) -> None:
        unit = self._unit
        source: Any = file
        if unit.size_bytes <= WHOLE_BYTES:
            source = pa.BufferReader(file.read())
        sha256, size = digest_stream(source)
        source.seek(0)
        if size != unit.size_bytes:
            self._report(
                "bytes", unit.shard, f"has {size} bytes, the manifest says {unit.size_bytes}"
            )
        elif sha256 != unit.sha256:
            found = f"sha256 is {sha256}, the manifest says {unit.sha256}"
            self._report("bytes", unit.shard, found)
        self._parquet(source)

    def _parquet(self, source: Any) -> None:
        try:
            file = pq.ParquetFile(source, page_checksum_verification=True)
            schema, sizes = file.schema_arrow, _group_sizes(file)
        except (pa.ArrowException, OSError, ValueError) as error:
            refuse_unreadable(error, self._store.path(self._unit.shard))
            found = f"the footer cannot be read: {first_line(error)}"
            self._report("pages", self._unit.shard, found)
            return
        expected = arrow_schema(self._spec.record)
        if not schema.equals(expected):
            found = f"has columns {schema.names}, the label set's are {expected.names}"
            if schema.names == expected.names:
                differ = [field.name for field in expected if schema.field(field.name) != field]
                found = f"has other types than the label set in {differ}"
            self._report("record", self._unit.shard, found)
            return
        owner = (schema.metadata or {}).get(FINGERPRINT_KEY, b"").decode(errors="replace")
        if owner != self._fingerprint:
            found = f"is of a label set with fingerprint {owner or 'none'}, found in one with "
            self._report("record", self._unit.shard, found + self._fingerprint)
        self._groups(file, sizes)

    def _groups(self, file: pq.ParquetFile, sizes: list[int]) -> None:
        unit = self._unit
        if sizes != unit.row_groups:
            found = f"has row groups of {sizes} rows, the manifest says {unit.row_groups}"
            self._report("record", unit.shard, found)
        if self._keys is not None:
            self._places(sizes)
        tokens = labels = first = 0
        whole = True
        for index, size in enumerate(sizes):
            rows = self._decode(file, index)
            whole = whole and rows is not None
            if rows is not None:
                tokens += rows.num_tokens
                labels += rows.num_labels
                self._invariants(rows, index)
                self._identities(rows, index)
                self._against_keys(rows, index, first)
            first += size
        if whole and (tokens, labels) != (unit.num_tokens, unit.num_labels):
            self._report(
                "record", unit.shard, f"holds {tokens} tokens and {labels} labels, the manifest "
                f"says {unit.num_tokens} and {unit.num_labels}",
            )  # fmt: skip

    def _decode(self, file: pq.ParquetFile, index: int) -> LabelRows | None:
        """The rows of a row group, or None once its damage is reported, column by column."""
        rel, names = self._unit.shard, self._spec.record.columns
        try:
            table = file.read_row_group(index, columns=names, use_threads=False)
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            refuse_unreadable(error, self._store.path(rel))
            damaged = list(_damaged_columns(file, index, names))
            for name, found in damaged or [("", first_line(error))]:
                self._report("pages", rel, f"damaged bytes: {found}", row_group=index, column=name)
            return None
        try:
            return LabelRows.from_table(table, self._spec.record)
        except RecordError as error:
            self._report("record", rel, first_line(error), row_group=index)
            return None

    def _invariants(self, rows: LabelRows, index: int) -> None:
        """The rules of `validate`; where one is broken, row by row, to name all that break one."""
        try:
            validate(rows, self._spec.record, self._spec.teacher.vocab_size)
            return
        except RecordError as error:
            whole = first_line(error)
        broken = 0
        for row in range(len(rows)):
            try:
                one = rows.slice(row, row + 1)
                validate(one, self._spec.record, self._spec.teacher.vocab_size)
            except RecordError as error:
                broken += 1
                if broken <= SHOWN_ROWS:
                    self._row("record", rows, index, row, first_line(error).removeprefix("row 0, "))
        if not broken:
            self._report("record", self._unit.shard, whole, row_group=index)
        elif broken > SHOWN_ROWS:
            found = f"{broken - SHOWN_ROWS} more rows break an invariant of the record"
            self._report("record", self._unit.shard, found, row_group=index)

    def _identities(self, rows: LabelRows, index: int) -> None:
        """Keys are the hashes of what the rows hold (generated rows are keyed by their prompts)."""
        bad = 0
        for row in range(len(rows)):
            ids = rows.token_ids[rows.token_offsets[row] : rows.token_offsets[row + 1]]
            spans = rows.label_spans[rows.span_offsets[row] : rows.span_offsets[row + 1]]
            wanted = {"content_key": content_key(ids, spans)}
            if self._spec.generation is None:
                wanted["row_key"] = row_key(ids, spans, _context(rows, row))
            for name, key in wanted.items():
                if getattr(rows, name)[row].tobytes() == key:
                    continue
                bad += 1
                if bad <= SHOWN_ROWS:
                    found = f"{name} is not the hash of the row, which is {key.hex()}"
                    self._row("record", rows, index, row, found)
        if bad > SHOWN_ROWS:
            found = f"{bad - SHOWN_ROWS} more keys are not the hashes of their rows"
            self._report("record", self._unit.shard, found, row_group=index)

    def _places(self, sizes: list[int]) -> None:
        """The key file counts rows through the row groups."""
        groups = np.repeat(np.arange(len(sizes)), sizes)
        places = np.concatenate([np.arange(size) for size in sizes] or [np.zeros(0, np.int64)])
        for name, expected in (("row_group", groups), ("row", places)):
            if not np.array_equal(self._keys.column(name).to_numpy(), expected):
                found = f"{name} does not count through the shard's row groups of {sizes} rows"
                self._report("keys", self._unit.keys, found, column=name)

    def _against_keys(self, rows: LabelRows, index: int, first: int) -> None:
        """The key file says of each row what the shard holds."""
        if self._keys is None:
            return
        mine = self._keys.slice(first, len(rows))
        if len(mine) != len(rows):
            return  # numbers of rows differ, which is reported
        differs = {
            "row_key": (key_array(mine, "row_key") != rows.row_key).any(axis=1),
            "num_tokens": mine.column("num_tokens").to_numpy() != np.diff(rows.token_offsets),
            "num_labels": mine.column("num_labels").to_numpy() != np.diff(rows.label_offsets),
        }
        for name, bad in differs.items():
            if bad.any():
                row = int(np.argmax(bad))
                self._report(
                    "keys", self._unit.keys,
                    f"{int(bad.sum())} rows differ from shard {self._unit.shard}, this the first",
                    row_group=index, row=row, column=name,
                )  # fmt: skip

    def _row(self, what: str, rows: LabelRows, index: int, row: int, found: str) -> None:
        key = rows.row_key[row].tobytes().hex()
        self._report(what, self._unit.shard, found, row_group=index, row=row, row_key=key)


def _group_sizes(file: pq.ParquetFile) -> list[int]:
    return [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]


def _damaged_columns(
    file: pq.ParquetFile, index: int, names: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    for name in names:
        try:
            file.read_row_group(index, columns=[name], use_threads=False)
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            yield name, first_line(error)


def _context(rows: LabelRows, row: int) -> Any:
    if rows.teacher_context is None or rows.context_offsets is None:
        return None
    return rows.teacher_context[rows.context_offsets[row] : rows.context_offsets[row + 1]]
