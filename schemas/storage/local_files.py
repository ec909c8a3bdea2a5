"""Crash-safe writes of local files, and SHA-256 digests of streams."""

import hashlib
import os
import uuid
from pathlib import Path
from typing import IO, Any

from schemas.errors import StoreError

TEMPORARY_PREFIX = ".writing-"

_BLOCK_BYTES = 2**22


def replace_file(path: Path, data: bytes) -> None:
    """Atomically writes or replaces a file: even after a crash, readers see the old or new content.

    Raises:
        StoreError: the file cannot be written.
    """
    temporary = write_temporary(path, data)
    try:
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_temporary(final: Path, data: bytes) -> Path:
    """Durably writes a temporary file beside `final`, to be renamed or linked to it.

    Raises:
        StoreError: the file cannot be written.
    """
    temporary = final.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StoreError(f"{final}: cannot be written ({error.strerror})") from error
    return temporary


def sync_folder(folder: Path) -> None:
    """Makes created, renamed and deleted names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest_stream(source: IO[bytes], copy_to: IO[bytes] | None = None) -> tuple[str, int]:
    """Reads a stream to its end and optionally copies it.

    Returns:
        The SHA-256 digest, hexadecimal, and the number of bytes.
    """
    sha256, size = hashlib.sha256(), 0
    while block := source.read(_BLOCK_BYTES):
        sha256.update(block)
        size += len(block)
        if copy_to is not None:
            copy_to.write(block)
    return sha256.hexdigest(), size


class HashingWriter:
    """Wraps a file that is written sequentially; hashes and counts its bytes.

    Attributes:
        size_bytes: bytes written so far.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self.size_bytes = 0
        self.closed = False

    @property
    def sha256(self) -> str:
        """Digest of the bytes written so far, hexadecimal."""
        return self._sha256.hexdigest()

    def write(self, data: Any) -> int:
        self._sha256.update(data)
        size = memoryview(data).nbytes
        self.size_bytes += size
        self._file.write(data)
        return size

    def tell(self) -> int:
        return self.size_bytes

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self.closed = True  # the underlying file belongs to the caller
