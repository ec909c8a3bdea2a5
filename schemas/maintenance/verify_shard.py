"""Verifies bytes, pages, schema, rows and invariants of a shard against manifest and key file."""

from collections.abc import Iterator
from typing import IO, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.errors import RecordError, first_line
from schemas.keys import content_key, row_key
from schemas.label_set.label_set import LabelSet
from schemas.label_set.manifest import Manifest
from schemas.label_set.shards import FINGERPRINT_KEY, PARQUET_ERRORS, schema_problem
from schemas.label_set.tables import KEYS, unit_keys_table
from schemas.record.rows import LabelRows
from schemas.record.validate import validate
from schemas.storage.driver_errors import refuse_unreadable
from schemas.storage.local_files import digest_stream

SHOWN_ROWS = 20
"""Invalid rows reported individually per row group; the rest are only counted."""
MAX_BUFFER_BYTES = 256 * 2**20
"""Shards up to this size are read into memory once; larger ones are read twice."""


class Report(Protocol):
    """Records a problem of the unit; `place` may have row_group, row, row_key and column."""

    def __call__(self, what: str, file: str, found: str, **place: object) -> None: ...


class ShardCheck:
    """Verifies an entire shard, without stopping at the first problem."""

    def __init__(self, label_set: LabelSet, manifest: Manifest, keys: Any, report: Report) -> None:
        """
        Args:
            label_set: the label set.
            manifest: manifest of the shard's unit.
            keys: table in the unit's key file; None if the file is damaged.
            report: called for every problem.
        """
        self._store = label_set.store
        self._spec = label_set.spec
        self._fingerprint = label_set.fingerprint
        self._unit = manifest
        self._keys = keys
        self._report = report

    def run(self) -> None:
        """Reads the entire shard and reports its problems.

        Raises:
            StoreError: the store cannot be read; the shard may be intact.
        """
        rel = self._unit.shard
        try:
            with self._store.open(rel) as file:
                self._bytes(file)
        except FileNotFoundError:
            self._report("missing", rel, "no such shard, but the manifest names it")
        except OSError as error:
            refuse_unreadable(error, self._store.path(rel))
            self._report("bytes", rel, f"cannot be read ({first_line(error)})")

    def _bytes(self, file: IO[bytes]) -> None:
        unit = self._unit
        source: Any = file
        if unit.size_bytes <= MAX_BUFFER_BYTES:
            source = pa.BufferReader(file.read())
        sha256, size = digest_stream(source)
        source.seek(0)
        if size != unit.size_bytes:
            found = f"has {size} bytes, the manifest records {unit.size_bytes}"
            self._report("bytes", unit.shard, found)
        elif sha256 != unit.sha256:
            found = f"sha256 is {sha256}, the manifest records {unit.sha256}"
            self._report("bytes", unit.shard, found)
        self._parquet(source)

    def _parquet(self, source: Any) -> None:
        try:
            file = pq.ParquetFile(source, page_checksum_verification=True)
            schema, sizes = file.schema_arrow, _group_sizes(file)
        except PARQUET_ERRORS as error:
            refuse_unreadable(error, self._store.path(self._unit.shard))
            found = f"the footer cannot be read: {first_line(error)}"
            self._report("pages", self._unit.shard, found)
            return
        problem = schema_problem(schema, self._spec.record)
        if problem:
            self._report("record", self._unit.shard, problem)
            return
        owner = (schema.metadata or {}).get(FINGERPRINT_KEY, b"").decode(errors="replace")
        if owner != self._fingerprint:
            found = f"belongs to a label set with fingerprint {owner or 'none'}, found in one with "
            self._report("record", self._unit.shard, found + self._fingerprint)
        self._groups(file, sizes)

    def _groups(self, file: pq.ParquetFile, sizes: list[int]) -> None:
        unit = self._unit
        if sizes != unit.row_groups:
            found = f"has row groups of {sizes} rows, the manifest records {unit.row_groups}"
            self._report("record", unit.shard, found)
        tokens = labels = first = 0
        complete = True
        for index, size in enumerate(sizes):
            rows = self._decode(file, index)
            complete = complete and rows is not None
            if rows is not None:
                tokens += rows.num_tokens
                labels += rows.num_labels
                self._invariants(rows, index)
                self._identities(rows, index)
                self._against_keys(rows, index, first)
            first += size
        if complete and (tokens, labels) != (unit.num_tokens, unit.num_labels):
            recorded = f"{unit.num_tokens} and {unit.num_labels}"
            found = f"has {tokens} tokens and {labels} labels, the manifest records {recorded}"
            self._report("record", unit.shard, found)

    def _decode(self, file: pq.ParquetFile, index: int) -> LabelRows | None:
        """Reads a row group; if it is damaged, reports each damaged column and returns None."""
        rel, names = self._unit.shard, self._spec.record.columns
        try:
            table = file.read_row_group(index, columns=names, use_threads=False)
        except PARQUET_ERRORS as error:
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
        """Validates a row group; on failure, validates row by row to report each invalid row."""
        record, vocab_size = self._spec.record, self._spec.teacher.vocab_size
        try:
            validate(rows, record, vocab_size)
            return
        except RecordError as error:
            problem = first_line(error)
        invalid = []
        for row in range(len(rows)):
            try:
                validate(rows.slice(row, row + 1), record, vocab_size)
            except RecordError as error:
                invalid.append((row, first_line(error).removeprefix("row 0, ")))
        if not invalid:
            self._report("record", self._unit.shard, problem, row_group=index)
        self._report_rows(rows, index, invalid, "more rows violate an invariant of the record")

    def _identities(self, rows: LabelRows, index: int) -> None:
        """Checks that keys are the hashes of their rows (generated rows are keyed by prompt)."""
        wrong = []
        for row in range(len(rows)):
            ids = rows.token_ids[rows.token_offsets[row] : rows.token_offsets[row + 1]]
            spans = rows.label_spans[rows.span_offsets[row] : rows.span_offsets[row + 1]]
            expected = {"content_key": content_key(ids, spans)}
            if self._spec.generation is None:
                expected["row_key"] = row_key(ids, spans, _context(rows, row))
            for name, key in expected.items():
                if getattr(rows, name)[row].tobytes() != key:
                    wrong.append((row, f"{name} is not the hash of the row, {key.hex()}"))
        self._report_rows(rows, index, wrong, "more keys are not the hashes of their rows")

    def _report_rows(
        self, rows: LabelRows, index: int, problems: list[tuple[int, str]], remainder: str
    ) -> None:
        shard = self._unit.shard
        for row, found in problems[:SHOWN_ROWS]:
            key = rows.row_key[row].tobytes().hex()
            self._report("record", shard, found, row_group=index, row=row, row_key=key)
        if len(problems) > SHOWN_ROWS:
            found = f"{len(problems) - SHOWN_ROWS} {remainder}"
            self._report("record", shard, found, row_group=index)

    def _against_keys(self, rows: LabelRows, index: int, first: int) -> None:
        """Checks a row group, whose first row is row `first` of the unit, against the key file."""
        if self._keys is None:
            return
        found, expected = self._keys.slice(first, len(rows)), unit_keys_table(rows, [len(rows)])
        if len(found) != len(rows):
            return  # differing row counts are reported elsewhere
        groups = pa.array(np.full(len(rows), index, np.int32))
        expected = expected.set_column(1, KEYS.field("row_group"), groups)
        for name in KEYS.names:
            bad = pc.not_equal(found.column(name), expected.column(name)).to_numpy()
            if bad.any():
                problem = f"{int(bad.sum())} rows differ from shard {self._unit.shard}; the first"
                place = {"row_group": index, "row": int(np.argmax(bad)), "column": name}
                self._report("keys", self._unit.keys, problem, **place)


def _group_sizes(file: pq.ParquetFile) -> list[int]:
    return [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]


def _damaged_columns(
    file: pq.ParquetFile, index: int, names: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    for name in names:
        try:
            file.read_row_group(index, columns=[name], use_threads=False)
        except PARQUET_ERRORS as error:
            yield name, first_line(error)


def _context(rows: LabelRows, row: int) -> Any:
    if rows.teacher_context is None or rows.context_offsets is None:
        return None
    return rows.teacher_context[rows.context_offsets[row] : rows.context_offsets[row + 1]]
