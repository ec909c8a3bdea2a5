"""The corpus as pieces, and what is wrong with it.

All of this runs on the driver before Ray starts, so that a corpus that cannot be read fails in a
second and with one line. A *piece* is what one tokenising task reads (see ``readers``). A row is
known by its source (the path of its file, as the configuration names it) and its place in that
source:

========  =======================================  ==========================================
format    place of a row                           piece
========  =======================================  ==========================================
parquet   row number in the file                   adjacent row groups
jsonl     byte offset of its line, decompressed    a byte range; the whole file if compressed
text      0: a file is one document                a file
hf        row number in the Arrow file             adjacent record batches
========  =======================================  ==========================================

Small files that follow each other make one piece.
"""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import fsspec
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from labeler.config import CorpusConfig
from labeler.corpus_files import CorpusFile, find_files
from labeler.lines import compression_of, iter_lines
from schemas.errors import CorpusError

HEAD_BYTES = 1 << 18
"""Of a JSONL file, searched for the columns."""

READERS = 16
"""Files whose beginnings are read at the same time."""


@dataclass(frozen=True)
class Piece:
    """What one task reads.

    Attributes:
        index: Order of the piece in the corpus; rows of a piece come after those of lower pieces.
        files: One file, or several that are read whole.
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

    @property
    def is_whole(self) -> bool:
        """Whether its files are read from beginning to end."""
        return self.start == 0 and self.end == -1


def list_corpus(corpus: CorpusConfig) -> list[Piece]:
    """Lists the corpus as pieces, after checking that the columns asked for are there.

    Returns:
        Pieces in the order of the corpus: by path, then by place.

    Raises:
        CorpusError: Nothing is there, a file cannot be opened, or a column is missing or of the
            wrong type.
    """
    files = find_files(corpus)
    with ThreadPoolExecutor(READERS) as pool:
        cut = list(pool.map(lambda file: _cut(file, corpus), files))
    pieces = _joined([piece for of_file in cut for piece in of_file], corpus.piece_bytes)
    if not pieces:
        raise CorpusError(f"corpus.path {corpus.path} has {len(files)} files, but no row in them")
    return pieces


def _cut(file: CorpusFile, corpus: CorpusConfig) -> list[Piece]:
    try:
        return _CUT[corpus.format](file, corpus)
    except CorpusError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(f"cannot read {file.source} as {corpus.format}: {error}") from error


def _joined(pieces: list[Piece], limit_bytes: int) -> list[Piece]:
    """Pieces numbered in order; small files that follow each other become one piece."""
    joined: list[Piece] = []
    for piece in pieces:
        before = joined[-1] if joined else None
        if (
            before is not None
            and before.is_whole
            and piece.is_whole
            and before.size_bytes + piece.size_bytes <= limit_bytes
        ):
            size = before.size_bytes + piece.size_bytes
            joined[-1] = replace(before, files=before.files + piece.files, size_bytes=size)
        else:
            joined.append(replace(piece, index=len(joined)))
    return joined


def _whole(file: CorpusFile) -> Piece:
    return Piece(0, (file,), size_bytes=file.size_bytes)


def _cut_text(file: CorpusFile, corpus: CorpusConfig) -> list[Piece]:
    return [_whole(file)]


def _cut_jsonl(file: CorpusFile, corpus: CorpusConfig) -> list[Piece]:
    _check_jsonl(file, corpus)
    if not file.size_bytes:
        return []
    if compression_of(file.url) is not None or file.size_bytes <= corpus.piece_bytes:
        return [_whole(file)]
    edges = [*range(0, file.size_bytes, corpus.piece_bytes), file.size_bytes]
    return [
        Piece(0, (file,), start, end, size_bytes=end - start)
        for start, end in itertools.pairwise(edges)
    ]


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


def _cut_parquet(file: CorpusFile, corpus: CorpusConfig) -> list[Piece]:
    with fsspec.open(file.url, "rb") as stream:
        parquet = pq.ParquetFile(stream)
        check_columns(parquet.schema_arrow, file.source, corpus)
        groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
    sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    return _grouped(file, sizes, corpus.piece_bytes)


def _cut_hf(file: CorpusFile, corpus: CorpusConfig) -> list[Piece]:
    if not file.url.startswith("file://"):  # its batches can be found only by reading all of it
        with fsspec.open(file.url, "rb") as stream:
            check_columns(pa.ipc.open_stream(stream).schema, file.source, corpus)
        return [_whole(file)]
    with pa.memory_map(file.url.removeprefix("file://")) as stream:
        reader = pa.ipc.open_stream(stream)
        check_columns(reader.schema, file.source, corpus)
        sizes = [(batch.num_rows, batch.nbytes) for batch in reader]
    return _grouped(file, sizes, corpus.piece_bytes)


_CUT = {"text": _cut_text, "jsonl": _cut_jsonl, "parquet": _cut_parquet, "hf": _cut_hf}


def _grouped(file: CorpusFile, sizes: list[tuple[int, int]], limit_bytes: int) -> list[Piece]:
    """Adjacent parts of a file, each (rows, bytes), as pieces of about ``limit_bytes``."""
    pieces: list[Piece] = []
    start = row = 0
    while start < len(sizes):
        rows, total = sizes[start]
        end = start + 1
        while end < len(sizes) and total + sizes[end][1] <= limit_bytes:
            rows, total = rows + sizes[end][0], total + sizes[end][1]
            end += 1
        last = -1 if (start, end) == (0, len(sizes)) else end
        if rows:
            pieces.append(Piece(0, (file,), start, last, first_row=row, size_bytes=total))
        start, row = end, row + rows
    return pieces


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
