"""Lists the files of a corpus, checks them, and divides them into pieces.

Runs on the driver before Ray starts, so that an unreadable corpus fails within a second with a
one-line error. A *piece* is the input of one tokenising task (see ``readers``). A row is identified
by its source (the path of its file, as configured) and its place in that source:

========  =======================================  ==========================================
format    place of a row                           piece
========  =======================================  ==========================================
parquet   row number in the file                   adjacent row groups
jsonl     byte offset of its line, decompressed    a byte range; all of it if compressed
text      0: a file is one document                a group of files
hf        row number in the Arrow file             adjacent record batches
========  =======================================  ==========================================
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
from fsspec.utils import glob_translate

from labeler.config import CorpusConfig
from labeler.corpus.jsonl_lines import file_compression, iter_lines
from schemas.errors import CorpusError
from schemas.storage.driver_errors import store_errors

DEFAULT_GLOBS = {
    "parquet": ("**/*.parquet",),
    "jsonl": ("**/*.jsonl", "**/*.jsonl.gz", "**/*.jsonl.zst"),
    "text": ("**/*",),
}
HEAD_BYTES = 1 << 18  # start of a JSONL file in which the columns must appear


@dataclass(frozen=True)
class CorpusFile:
    """A corpus file: its URL, its name in rosters, its size."""

    url: str
    source: str
    size_bytes: int


@dataclass(frozen=True)
class Piece:
    """The part of a corpus that one task reads.

    Attributes:
        files: One file, or several for ``text``.
        size_bytes: For progress.
        start, end: Half-open range within the only file: bytes (jsonl), row groups (parquet),
            record batches (hf); 0 and -1: all.
        first_row: Row number of the first row in its file (parquet, hf).
        index: Order in the corpus; the rows of a piece come after those of lower pieces.
    """

    files: tuple[CorpusFile, ...]
    size_bytes: int
    start: int = 0
    end: int = -1
    first_row: int = 0
    index: int = 0


def list_corpus(corpus: CorpusConfig) -> list[Piece]:
    """Lists the corpus as pieces, after checking that it has the configured columns.

    Returns:
        Pieces ordered by path, then by place.

    Raises:
        CorpusError: The corpus is empty, a file cannot be opened, or a column is missing or of the
            wrong type.
        StoreError: The store of the corpus denies access or does not answer.
    """
    with store_errors(corpus.path):
        files = find_files(corpus)
    pieces = list(_cut_text(files, corpus)) if corpus.format == "text" else []
    for file in files if corpus.format != "text" else ():
        try:
            pieces += _CUT[corpus.format](file, corpus)
        except CorpusError:
            raise
        except (OSError, pa.ArrowException) as error:
            raise CorpusError(f"cannot read {file.source} as {corpus.format}: {error}") from error
    if not pieces:
        raise CorpusError(f"corpus.path {corpus.path} has {len(files)} files, but no rows")
    return [replace(piece, index=index) for index, piece in enumerate(pieces)]


def find_files(corpus: CorpusConfig) -> list[CorpusFile]:
    """Finds the files of a corpus, sorted by path.

    Raises:
        CorpusError: The path does not exist or no file matches.
    """
    fs, root = fsspec.core.url_to_fs(corpus.path)
    if any(mark in corpus.path for mark in "*?[") and not fs.exists(root):
        found = _with_sizes(fs.glob(root, detail=True))
        if not found:
            raise CorpusError(f"no file matches corpus.path {corpus.path}")
    elif not fs.exists(root):
        raise CorpusError(f"corpus.path {corpus.path} does not exist (looked for {root})")
    elif fs.isfile(root):
        found = {root: fs.size(root)}
    elif corpus.format == "hf":
        found = _hf_files(fs, root, corpus)
    else:
        found = _matching(fs, root, corpus)
    return [
        CorpusFile(fs.unstrip_protocol(path), _source_name(fs, path, corpus.path), size)
        for path, size in sorted(found.items())
    ]


def _with_sizes(listing: dict[str, dict[str, Any]]) -> dict[str, int]:
    return {path: info["size"] for path, info in listing.items() if info["type"] == "file"}


def _matching(fs: Any, root: str, corpus: CorpusConfig) -> dict[str, int]:
    listing = _with_sizes(fs.find(root, detail=True))
    globs = (corpus.glob,) if corpus.glob else DEFAULT_GLOBS[corpus.format]
    patterns = [re.compile(glob_translate(glob)) for glob in globs]
    found = {}
    for path, size in listing.items():
        relative = path[len(root) :].lstrip("/")
        hidden = any(part.startswith(".") for part in relative.split("/"))
        if not hidden and any(pattern.match(relative) for pattern in patterns):
            found[path] = size
    if not found:
        raise CorpusError(
            f"no file in corpus.path {corpus.path} matches {' or '.join(globs)} "
            f"({len(listing)} files found); set corpus.glob"
        )
    return found


def _hf_files(fs: Any, root: str, corpus: CorpusConfig) -> dict[str, int]:
    """The Arrow files of a dataset saved by ``datasets`` with ``save_to_disk``."""
    root = root.rstrip("/")
    if fs.exists(f"{root}/dataset_dict.json"):
        splits = json.loads(fs.cat_file(f"{root}/dataset_dict.json"))["splits"]
        raise CorpusError(
            f"corpus.path {corpus.path} holds the splits {', '.join(splits)}; name one of them, "
            f"such as {corpus.path.rstrip('/')}/{splits[0]}"
        )
    if not fs.exists(f"{root}/state.json"):
        raise CorpusError(
            f"corpus.path {corpus.path} is not a dataset saved to disk: it has no state.json"
        )
    state = json.loads(fs.cat_file(f"{root}/state.json"))
    paths = [f"{root}/{entry['filename']}" for entry in state["_data_files"]]
    return {path: fs.size(path) for path in paths}


def _source_name(fs: Any, path: str, given: str) -> str:
    """The name of a file in rosters: its path, relative if the configured path is relative."""
    if "file" not in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)):
        name = str(fs.unstrip_protocol(path))
    else:
        name = path if "://" in given or os.path.isabs(given) else os.path.relpath(path)
    return os.fsencode(name).decode(errors="backslashreplace")  # names need not be UTF-8


def _cut_text(files: list[CorpusFile], corpus: CorpusConfig) -> Iterator[Piece]:
    group: list[CorpusFile] = []
    size = 0
    for file in files:
        if group and size + file.size_bytes > corpus.piece_bytes:
            yield Piece(tuple(group), size)
            group, size = [], 0
        group.append(file)
        size += file.size_bytes
    if group:
        yield Piece(tuple(group), size)


def _cut_jsonl(file: CorpusFile, corpus: CorpusConfig) -> Iterator[Piece]:
    _check_jsonl(file, corpus)
    if file_compression(file.url) is not None:
        yield Piece((file,), file.size_bytes)
        return
    for start in range(0, file.size_bytes, corpus.piece_bytes):
        end = min(start + corpus.piece_bytes, file.size_bytes)
        yield Piece((file,), end - start, start, end)


def _check_jsonl(file: CorpusFile, corpus: CorpusConfig) -> None:
    """Checks that each configured column occurs in some row at the start of a file.

    Raises:
        CorpusError: Rows were found, but a column occurs in none of them.
    """
    found: dict[str, None] = {}
    seen = 0
    for _, line in iter_lines(file.url):
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            found.update(dict.fromkeys(row))
        seen += len(line)
        if seen > HEAD_BYTES:
            break
    if found:
        _check_names(list(found), file.source, corpus)


def _cut_parquet(file: CorpusFile, corpus: CorpusConfig) -> Iterator[Piece]:
    with fsspec.open(file.url, "rb") as stream:
        parquet = pq.ParquetFile(stream)
        _check_columns(parquet.schema_arrow, file.source, corpus)
        groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
    sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    yield from _cut_at_rows(file, sizes, corpus.piece_bytes)


def _cut_hf(file: CorpusFile, corpus: CorpusConfig) -> Iterator[Piece]:
    if not file.url.startswith("file://"):  # listing its batches would download the file
        with fsspec.open(file.url, "rb") as stream:
            _check_columns(pa.ipc.open_stream(stream).schema, file.source, corpus)
        yield Piece((file,), file.size_bytes)
        return
    with pa.memory_map(file.url.removeprefix("file://")) as stream:
        reader = pa.ipc.open_stream(stream)
        _check_columns(reader.schema, file.source, corpus)
        sizes = ((batch.num_rows, batch.nbytes) for batch in reader)
        yield from _cut_at_rows(file, sizes, corpus.piece_bytes)


_CUT = {"jsonl": _cut_jsonl, "parquet": _cut_parquet, "hf": _cut_hf}


def _cut_at_rows(
    file: CorpusFile, sizes: Iterable[tuple[int, int]], limit_bytes: int
) -> Iterator[Piece]:
    """Pieces of adjacent row groups or record batches, given as (rows, bytes)."""
    start = first_row = row = total = index = 0
    for rows, size in sizes:
        if index > start and total + size > limit_bytes:
            yield Piece((file,), total, start, index, first_row)
            start, first_row, total = index, row, 0
        row += rows
        total += size
        index += 1
    if index > start and row > first_row:  # trailing groups without rows need no task
        yield Piece((file,), total, start, index, first_row)


def required_columns(corpus: CorpusConfig) -> tuple[str, ...]:
    """The columns that a row must have, by the kind of the corpus."""
    if corpus.kind == "pair":
        return (corpus.prompt_column, corpus.response_column)
    spans = (corpus.spans_column,) if corpus.spans_column else ()
    return (corpus.text_column(), *spans)


def all_columns(corpus: CorpusConfig) -> tuple[str, ...]:
    """The required and the kept columns, without duplicates."""
    return tuple(dict.fromkeys((*required_columns(corpus), *corpus.keep_columns)))


def _check_columns(schema: pa.Schema, source: str, corpus: CorpusConfig) -> None:
    """Checks that a table has the configured columns, of readable types.

    Raises:
        CorpusError: A column is missing or of another type.
    """
    _check_names(schema.names, source, corpus)
    for name in required_columns(corpus):
        found = schema.field(name).type
        if not _is_readable(found, corpus.kind):
            expected = {"ids": "lists of integers", "chat": "lists of messages or JSON strings"}
            raise CorpusError(
                f'column "{name}" of {source} holds {found}; corpus.kind = "{corpus.kind}" expects '
                f"{expected.get(corpus.kind, 'strings')}"
            )


def _check_names(names: list[str], source: str, corpus: CorpusConfig) -> None:
    for name in all_columns(corpus):
        if name not in names:
            raise CorpusError(
                f'{source} has no column "{name}"; its columns are {", ".join(names) or "none"}'
            )


def _is_readable(found: pa.DataType, kind: str) -> bool:
    if pa.types.is_dictionary(found):
        found = found.value_type
    is_text = pa.types.is_string(found) or pa.types.is_large_string(found)
    is_text = is_text or pa.types.is_string_view(found)
    is_list = pa.types.is_list(found) or pa.types.is_large_list(found)
    is_list = is_list or pa.types.is_fixed_size_list(found)
    if kind == "ids":
        return is_list and pa.types.is_integer(found.value_type)
    if kind == "chat":
        return is_text or (is_list and pa.types.is_nested(found.value_type))
    return is_text
