"""Reads lines of a plain or compressed file with their byte offsets."""

import os
from collections.abc import Iterator

import fsspec
import pyarrow as pa

READ_BYTES = 1 << 20
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def file_compression(name: str) -> str | None:
    """Returns pyarrow's name of a file's compression, by suffix; None for plain files."""
    return COMPRESSIONS.get(os.path.splitext(name)[1])


def iter_lines(url: str, start: int = 0, end: int = -1) -> Iterator[tuple[int, bytes]]:
    """Yields (byte offset, line without its newline) of the lines that **begin** in [start, end).

    So every line of a file belongs to exactly one of its ranges. Offsets count decompressed bytes.
    """
    with fsspec.open(url, "rb") as stream:
        compression = file_compression(url)
        if compression is not None:
            stream = pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), compression)
        position, rest = 0, b""
        skip_first = start > 0
        if skip_first:  # starts one byte early, so that a line beginning at start is kept
            stream.seek(start - 1)
            position = start - 1
        while chunk := stream.read(READ_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if end >= 0 and position >= end:
                    return
                if not skip_first:
                    yield position, line
                skip_first = False
                position += len(line) + 1
        if rest and not skip_first and (end < 0 or position < end):
            yield position, rest
