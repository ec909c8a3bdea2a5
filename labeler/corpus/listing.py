"""The corpus: which files it has, how they are cut into pieces, and what is wrong with it.

All of this runs on the driver before Ray starts, so that a corpus that cannot be read fails in a
second and with one line. A *piece* is what one tokenising task reads (see ``readers``). A row is
known by its source (the path of its file, as the configuration names it) and its place in that
source:

========  =======================================  ==========================================
format    place of a row                           piece
========  =======================================  ==========================================
parquet   row number in the file                   adjacent row groups
jsonl     byte offset of its line, decompressed    a byte range; the whole file if compressed
text      0: a file is one document                a group of files
hf        row number in the Arrow file             adjacent record batches
========  =======================================  ==========================================
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
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
HEAD_BYTES = 1 << 18  # of a JSONL file, searched for the columns


@dataclass(frozen=True)
class CorpusFile:
    """One file: where to open it and what rosters call it."""

    url: str
    source: str
    size_bytes: int


@dataclass(frozen=True)
class Piece:
    """What one task reads.

    Attributes:
        index: Order of the piece in the corpus; rows of a piece come after those of lower pieces.
        files: One file, or several for ``text``.
        start, end: Half-open range within the only file: bytes (jsonl), row groups (parquet),
            record batches (hf); 0 and -1 for "all of it".
        first_row: Row number of the first row in its file (parquet, hf).
        size_bytes: Share of the corpus, for progress.
    """

    index: int
    files: tuple[CorpusFile, ...]
    start: int = 0
    end: int = -1
    first_row: int = 0
    size_bytes: int = 0


@dataclass
class _Cutter:
    """Numbers pieces while they are cut."""

    pieces: list[Piece] = field(default_factory=list)

    def add(self, files: tuple[CorpusFile, ...], **fields: int) -> None:
        self.pieces.append(Piece(index=len(self.pieces), files=files, **fields))


def list_corpus(corpus: CorpusConfig) -> list[Piece]:
    """Lists the corpus as pieces, after checking that the columns asked for are there.

    Returns:
        Pieces in the order of the corpus: by path, then by place.

    Raises:
        CorpusError: Nothing is there, a file cannot be opened, or a column is missing or of the
            wrong type.
        StoreError: The store of the corpus lets nobody in, or does not answer.
    """
    with store_errors(corpus.path):
        files = find_files(corpus)
    cutter = _Cutter()
    if corpus.format == "text":
        _cut_text(cutter, files, corpus)
    for file in files if corpus.format != "text" else ():
        try:
            _CUT[corpus.format](cutter, file, corpus)
        except CorpusError:
            raise
        except (OSError, pa.ArrowException) as error:
            raise CorpusError(f"cannot read {file.source} as {corpus.format}: {error}") from error
    if not cutter.pieces:
        raise CorpusError(f"corpus.path {corpus.path} has {len(files)} files, but no row in them")
    return cutter.pieces


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
            f"({len(listing)} files are there); set corpus.glob"
        )
    return found


def _hf_files(fs: Any, root: str, corpus: CorpusConfig) -> dict[str, int]:
    """The Arrow files of a dataset that ``datasets`` saved with ``save_to_disk``."""
    root = root.rstrip("/")
    if fs.exists(f"{root}/dataset_dict.json"):
        splits = json.loads(fs.cat_file(f"{root}/dataset_dict.json"))["splits"]
        raise CorpusError(
            f"corpus.path {corpus.path} holds the splits {', '.join(splits)}; name one of them, "
            f"such as {corpus.path.rstrip('/')}/{splits[0]}"
        )
    if not fs.exists(f"{root}/state.json"):
        raise CorpusError(
            f"corpus.path {corpus.path} is no dataset saved to disk: it has no state.json"
        )
    state = json.loads(fs.cat_file(f"{root}/state.json"))
    paths = [f"{root}/{entry['filename']}" for entry in state["_data_files"]]
    return {path: fs.size(path) for path in paths}


def _source_name(fs: Any, path: str, given: str) -> str:
    """What rosters call a file: its path, relative if the configured one is."""
    if "file" not in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)):
        name = str(fs.unstrip_protocol(path))
    else:
        name = path if "://" in given or os.path.isabs(given) else os.path.relpath(path)
    return os.fsencode(name).decode(errors="backslashreplace")  # names need not be UTF-8


def _cut_text(cutter: _Cutter, files: list[CorpusFile], corpus: CorpusConfig) -> None:
    group: list[CorpusFile] = []
    size = 0
    for file in files:
        if group and size + file.size_bytes > corpus.piece_bytes:
            cutter.add(tuple(group), size_bytes=size)
            group, size = [], 0
        group.append(file)
        size += file.size_bytes
    if group:
        cutter.add(tuple(group), size_bytes=size)


def _cut_jsonl(cutter: _Cutter, file: CorpusFile, corpus: CorpusConfig) -> None:
    _check_jsonl(file, corpus)
    if file_compression(file.url) is not None:
        cutter.add((file,), size_bytes=file.size_bytes)
        return
    for start in range(0, file.size_bytes, corpus.piece_bytes):
        end = min(start + corpus.piece_bytes, file.size_bytes)
        cutter.add((file,), start=start, end=end, size_bytes=end - start)


def _check_jsonl(file: CorpusFile, corpus: CorpusConfig) -> None:
    """Checks that the rows at the start of a file have the columns asked for.

    Raises:
        CorpusError: Rows were found, and one of the columns is in none of them.
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
        wanted = (*wanted_columns(corpus), *corpus.keep_columns)
        check_names(list(found), file.source, wanted)


def _cut_parquet(cutter: _Cutter, file: CorpusFile, corpus: CorpusConfig) -> None:
    with fsspec.open(file.url, "rb") as stream:
        parquet = pq.ParquetFile(stream)
        check_columns(parquet.schema_arrow, file.source, corpus)
        groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
    sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    for start, end, first_row, size in _grouped(iter(sizes), corpus.piece_bytes):
        cutter.add((file,), start=start, end=end, first_row=first_row, size_bytes=size)


def _cut_hf(cutter: _Cutter, file: CorpusFile, corpus: CorpusConfig) -> None:
    if not file.url.startswith("file://"):  # its batches can be found only by reading all of it
        with fsspec.open(file.url, "rb") as stream:
            check_columns(pa.ipc.open_stream(stream).schema, file.source, corpus)
        cutter.add((file,), size_bytes=file.size_bytes)
        return
    with pa.memory_map(file.url.removeprefix("file://")) as stream:
        reader = pa.ipc.open_stream(stream)
        check_columns(reader.schema, file.source, corpus)
        sizes = ((batch.num_rows, batch.nbytes) for batch in reader)
        for start, end, first_row, size in _grouped(sizes, corpus.piece_bytes):
            cutter.add((file,), start=start, end=end, first_row=first_row, size_bytes=size)


_CUT = {"jsonl": _cut_jsonl, "parquet": _cut_parquet, "hf": _cut_hf}


def _grouped(
    sizes: Iterator[tuple[int, int]], limit_bytes: int
) -> Iterator[tuple[int, int, int, int]]:
    """Groups adjacent (rows, bytes) into (start, end, first row, bytes)."""
    start = first_row = row = total = index = 0
    for rows, size in sizes:
        if index > start and total + size > limit_bytes:
            yield start, index, first_row, total
            start, first_row, total = index, row, 0
        row += rows
        total += size
        index += 1
    if index > start and row > first_row:
        yield start, index, first_row, total


def wanted_columns(corpus: CorpusConfig) -> tuple[str, ...]:
    """The columns whose absence makes a row useless, by the kind of the corpus."""
    if corpus.kind == "pair":
        return (corpus.prompt_column, corpus.response_column)
    spans = (corpus.spans_column,) if corpus.spans_column else ()
    return (corpus.text_column(), *spans)


def check_columns(schema: pa.Schema, source: str, corpus: CorpusConfig) -> None:
    """Checks that a table has the columns asked for, of a type that can be read.

    Raises:
        CorpusError: Names the file, the column, and the columns that exist.
    """
    check_names(schema.names, source, (*wanted_columns(corpus), *corpus.keep_columns))
    for name in wanted_columns(corpus):
        found = schema.field(name).type
        if not _readable(found, name, corpus):
            wanted = "lists of integers" if corpus.kind == "ids" else "strings"
            wanted = "lists of messages or JSON strings" if corpus.kind == "chat" else wanted
            raise CorpusError(
                f'column "{name}" of {source} holds {found}, but corpus.kind "{corpus.kind}" wants '
                f"{wanted}"
            )


def check_names(names: list[str], source: str, wanted: tuple[str, ...]) -> None:
    """Checks that all columns wanted are among the names found."""
    for name in wanted:
        if name not in names:
            raise CorpusError(
                f'{source} has no column "{name}"; its columns are {", ".join(names) or "none"}'
            )


def _readable(found: pa.DataType, name: str, corpus: CorpusConfig) -> bool:
    if pa.types.is_dictionary(found):
        found = found.value_type
    is_text = pa.types.is_string(found) or pa.types.is_large_string(found)
    is_text = is_text or pa.types.is_string_view(found)
    is_list = pa.types.is_list(found) or pa.types.is_large_list(found)
    is_list = is_list or pa.types.is_fixed_size_list(found)
    if corpus.kind == "ids":
        return is_list and pa.types.is_integer(found.value_type)
    if corpus.kind == "chat":
        return is_text or (is_list and pa.types.is_nested(found.value_type))
    return is_text
