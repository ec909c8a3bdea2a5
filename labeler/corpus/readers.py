"""Reads a piece of the corpus row by row.

Library readers do not fit: each input row must be accounted for by its place, and a bad row
(invalid UTF-8, bad JSON, a missing value) must become one quarantined row instead of failing the
job. A damaged file (it cannot be opened, a page is corrupt) does fail the job, with one line.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from labeler.config import CorpusConfig
from labeler.corpus.jsonl_lines import iter_lines
from labeler.corpus.listing import Piece, all_columns, required_columns
from schemas.errors import CorpusError, RowFailure

BATCH_ROWS = 256


@dataclass(frozen=True)
class SourceRow:
    """One row of the corpus, or the reason why it cannot be read.

    Attributes:
        source, place: Where the row is; see ``listing``.
        values: Required and kept columns by name. Lists of integers come as integer arrays.
        failure: Why the row cannot be used; None if it can.
    """

    source: str
    place: int
    values: dict[str, Any]
    failure: RowFailure | None = None


def read_piece(piece: Piece, corpus: CorpusConfig) -> Iterator[SourceRow]:
    """Reads the rows of a piece in the order of their places.

    Raises:
        CorpusError: A file cannot be read any further; names the file.
    """
    try:
        yield from _READ[corpus.format](piece, corpus)
    except (OSError, pa.ArrowException) as error:
        names = ", ".join(file.source for file in piece.files[:3])
        raise CorpusError(
            f"cannot read {names} any further ({corpus.format}, range {piece.start}:{piece.end}): "
            f"{error}; repair the file or take it out of corpus.path"
        ) from error


def _read_text(piece: Piece, corpus: CorpusConfig) -> Iterator[SourceRow]:
    for file in piece.files:
        try:
            with fsspec.open(file.url, "rb") as stream:
                data = stream.read()
        except (FileNotFoundError, PermissionError) as error:
            yield _failed(file.source, 0, "unreadable_file", str(error))
            continue
        yield _row(file.source, 0, {corpus.text_column(): _decode(data, first=True)})


def _decode(data: bytes, first: bool = False) -> str | RowFailure:
    """Decodes bytes; drops a byte order mark at the start of a file."""
    try:
        return data.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        return RowFailure("invalid_utf8", f"byte {error.start}: {error.reason}")


def _row(source: str, place: int, values: dict[str, Any]) -> SourceRow:
    for name, value in values.items():
        if isinstance(value, RowFailure):
            return _failed(source, place, value.reason, f'column "{name}": {value.detail}')
    return SourceRow(source, place, values)


def _failed(source: str, place: int, reason: str, detail: str) -> SourceRow:
    return SourceRow(source, place, {}, RowFailure(reason, detail))


def _read_jsonl(piece: Piece, corpus: CorpusConfig) -> Iterator[SourceRow]:
    (file,) = piece.files
    for place, line in iter_lines(file.url, piece.start, piece.end):
        if line.strip():  # blank lines are not rows
            yield _parse_line(file.source, place, line, corpus)


def _parse_line(source: str, place: int, line: bytes, corpus: CorpusConfig) -> SourceRow:
    text = _decode(line, first=place == 0)
    if isinstance(text, RowFailure):
        return SourceRow(source, place, {}, text)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        return _failed(source, place, "bad_json", str(error))
    if not isinstance(found, dict):
        detail = f"expected an object, found {type(found).__name__}"
        return _failed(source, place, "wrong_type", detail)
    wanted = required_columns(corpus)
    missing = [name for name in wanted if name not in found]
    if missing:
        detail = f'no "{missing[0]}"; found {", ".join(map(str, found)) or "nothing"}'
        return _failed(source, place, "missing_column", detail)
    return SourceRow(source, place, {name: found.get(name) for name in all_columns(corpus)})


def _read_parquet(piece: Piece, corpus: CorpusConfig) -> Iterator[SourceRow]:
    (file,) = piece.files
    with fsspec.open(file.url, "rb") as stream:
        parquet = pq.ParquetFile(stream, page_checksum_verification=True)
        batches = parquet.iter_batches(
            batch_size=BATCH_ROWS,
            row_groups=list(range(piece.start, piece.end)),
            columns=list(all_columns(corpus)),
        )
        yield from _table_rows(batches, file.source, piece.first_row, corpus)


def _read_hf(piece: Piece, corpus: CorpusConfig) -> Iterator[SourceRow]:
    (file,) = piece.files
    with fsspec.open(file.url, "rb") as stream:
        reader = pa.ipc.open_stream(stream)
        inside = (
            batch
            for index, batch in enumerate(reader)
            if index >= piece.start and (piece.end < 0 or index < piece.end)
        )
        yield from _table_rows(inside, file.source, piece.first_row, corpus)


def _table_rows(
    batches: Iterator[pa.RecordBatch], source: str, place: int, corpus: CorpusConfig
) -> Iterator[SourceRow]:
    names = all_columns(corpus)
    for batch in batches:
        columns = [_values(batch.column(batch.schema.get_field_index(name))) for name in names]
        for values in zip(*columns, strict=True):
            yield _row(source, place, dict(zip(names, values, strict=True)))
            place += 1


def _values(column: pa.Array) -> Sequence[Any]:
    """Returns a column as Python objects, with a ``RowFailure`` for each invalid value."""
    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if lists and pa.types.is_integer(kind.value_type):
        arrays = _integer_lists(column)
        if arrays is not None:
            return arrays
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # one bad value fails the column: convert them one by one
        return [_value(scalar) for scalar in column]


def _integer_lists(column: pa.Array) -> list[Any] | None:
    """Lists of integers as arrays, avoiding Python integers; None if a list contains nulls."""
    flat = column.values
    if flat.null_count:
        return None
    numbers = flat.to_numpy(zero_copy_only=False)
    offsets = column.offsets.to_numpy()
    rows: list[np.ndarray | None] = [
        numbers[begin:end] for begin, end in itertools.pairwise(offsets)
    ]
    if column.null_count:
        valid = column.is_valid().to_numpy(zero_copy_only=False)
        rows = [row if ok else None for row, ok in zip(rows, valid, strict=True)]
    return rows


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return RowFailure("invalid_utf8", f"byte {error.start}: {error.reason}")


_READ = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet, "hf": _read_hf}
