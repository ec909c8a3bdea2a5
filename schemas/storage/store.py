"""Files behind one fsspec URL, with two kinds of atomic writes.

`Store.write_bytes` replaces a file atomically. `Store.create_exclusive` creates a file atomically
and succeeds for exactly one of any number of concurrent writers; it commits units of labels.

A local path and its ``file://`` URL are the same store. Transient failures are retried by the
policy of `schemas.storage.retry`; all other driver failures become a `StoreError`.
"""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import fsspec

from schemas.errors import MissingError, StoreError
from schemas.fault_points import fault_point
from schemas.storage.driver_errors import GuardedFile, store_errors, store_failure
from schemas.storage.local_files import (
    TEMPORARY_PREFIX,
    replace_file,
    sync_folder,
    write_temporary,
)
from schemas.storage.retry import retried

# Stores whose fsspec driver implements mode "create" as one conditional request (`memory` lives in
# one process). Other drivers check and then write, so two writers could both succeed.
EXCLUSIVE_PROTOCOLS = frozenset(
    {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "azure", "memory"}
)
# The optional dependency group that installs the driver of a protocol.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"} | dict.fromkeys(
    ("abfs", "abfss", "az", "adl", "azure"), "azure"
)


@dataclass(frozen=True)
class StoredFile:
    """A file in a listing.

    Attributes:
        rel: path in the store.
        modified: time of the last write.
    """

    rel: str
    size_bytes: int
    modified: datetime


class Store:
    """A folder on any file system that fsspec supports; `rel` is a path in it, with slashes.

    Attributes:
        url: URL as given.
        fs: the fsspec file system.
        root: the folder, in the form that `fs` expects.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") if "://" not in url else url
        try:
            with store_errors(self.url):
                self.fs, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            extra = _EXTRAS.get(url.partition("://")[0])
            advice = f"; pip install 'tutelage[{extra}]'" if extra else ""
            raise StoreError(f"{url}: no file system for this URL ({error}){advice}") from error
        except ValueError as error:
            raise StoreError(f"{url}: no file system for this URL ({error})") from error
        self.root: str = str(root).rstrip("/") or "/"
        protocol = self.fs.protocol
        self._protocols = {protocol} if isinstance(protocol, str) else set(protocol)

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return Store, (self.url,)

    @property
    def is_local(self) -> bool:
        """Whether this is a local file system."""
        return "file" in self._protocols

    def path(self, *parts: str) -> str:
        """The full path of a file, in the form that `fs` expects."""
        return "/".join((self.root.rstrip("/"), *parts)) if parts else self.root

    @retried
    def exists(self, rel: str = "") -> bool:
        """Whether a file or folder exists; by default, whether the root does."""
        return bool(self.fs.exists(self.path(rel) if rel else self.root))

    @retried
    def size(self, rel: str) -> int:
        """The size of a file in bytes.

        Raises:
            MissingError: it does not exist.
        """
        with self._required(rel):
            return int(self.fs.size(self.path(rel)))

    @retried
    def read_bytes(self, rel: str) -> bytes:
        """Reads a file.

        Raises:
            MissingError: it does not exist.
        """
        with self._required(rel):
            return bytes(self.fs.cat_file(self.path(rel)))

    @retried
    def open(self, rel: str, mode: str = "rb") -> IO[bytes]:
        """Opens a file; creates its folder for writing. Call `sync` after writing and closing it.

        Raises:
            MissingError: it is opened for reading and does not exist.
        """
        if "r" not in mode:
            self._make_folder(rel)
        with self._required(rel):
            if self.is_local:
                return open(self.path(rel), mode)
            opened = self.fs.open(self.path(rel), mode)
            file: Any = GuardedFile(opened, f"{self.url.rstrip('/')}/{rel}")
            return file

    @retried
    def sync(self, rel: str) -> None:
        """Makes a written file and its name durable."""
        if self.is_local:
            with open(self.path(rel), "rb") as file:
                os.fsync(file.fileno())
            sync_folder(Path(self.path(rel)).parent)

    @retried
    def write_bytes(self, rel: str, data: bytes) -> None:
        """Atomically writes or replaces a file: readers see the old or the new content."""
        self._make_folder(rel)
        if not self.is_local:
            self.fs.pipe_file(self.path(rel), data)
            return
        replace_file(Path(self.path(rel)), data)

    @retried
    def create_exclusive(self, rel: str, data: bytes) -> bool:
        """Atomically creates a file unless it exists. Exactly one of all writers gets True.

        Writers must pass different `data`, for example by including an attempt id: on an object
        store, a request retried after a lost response may find the file that it created itself,
        which only its content reveals.

        Returns:
            True if this call created the file; False if it existed and is unchanged.

        Raises:
            StoreError: the store cannot create exclusively, or the write failed.
        """
        self._make_folder(rel)
        if self.is_local:
            return _link_exclusive(Path(self.path(rel)), data)
        self._refuse_unconditional()
        try:
            self.fs.pipe_file(self.path(rel), data, mode="create")
        except Exception as error:  # noqa: BLE001  # only the file itself shows whether the write took effect
            try:
                found = self.read_bytes(rel)
            except StoreError:
                raise store_failure(error, self.path(rel), "cannot be created") from error
            return found == data
        return True

    def probe_exclusive(self) -> None:
        """Tests that an object store honours conditional writes.

        Raises:
            StoreError: the same file could be created twice, or the store cannot be written.
        """
        if self.is_local:
            return
        rel = f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        try:
            first, second = (self.create_exclusive(rel, data) for data in (b"first", b"second"))
        finally:
            self.delete(rel)
        if not first or second:
            raise StoreError(
                f"{self.url}: this store does not honour conditional writes, so two writers could "
                "both commit; use a store that does, or a local path"
            )

    @retried
    def walk(self, rel: str) -> list[StoredFile]:
        """Lists all files below a folder, including temporary ones, sorted by path.

        Files deleted concurrently may be missing; a folder that does not exist is empty.
        """
        found = []
        for path, entry in self.fs.find(self.path(rel), detail=True).items():
            with contextlib.suppress(FileNotFoundError):
                below = str(path)[len(self.root.rstrip("/")) + 1 :]
                size = int(entry["size"] or 0)
                found.append(StoredFile(below, size, _modified(self.fs, str(path), entry)))
        return sorted(found, key=lambda file: file.rel)

    @retried
    def folders(self, rel: str) -> list[str]:
        """Relative paths of a folder's direct subfolders, sorted."""
        folder = self.path(rel) if rel else self.root
        try:
            entries = self.fs.ls(folder, detail=True)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return []
        names = (
            str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]
            for entry in entries
            if entry["type"] == "directory"
        )
        return sorted(f"{rel}/{name}" if rel else name for name in names)

    @retried
    def list(self, rel: str, suffix: str = "") -> list[str]:
        """Relative paths of a folder's direct files, sorted; empty if it does not exist."""
        folder = self.path(rel)
        try:
            entries = os.listdir(folder) if self.is_local else self.fs.ls(folder, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = (entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries)
        wanted = (n for n in names if n.endswith(suffix) and not n.startswith(TEMPORARY_PREFIX))
        return sorted(f"{rel}/{name}" for name in wanted)

    @retried
    def delete(self, rel: str) -> None:
        """Deletes a file, or a folder and its content, if it exists."""
        path = self.path(rel)
        with contextlib.suppress(FileNotFoundError):
            if not self.is_local:
                # Not fs.rm, which treats brackets in names as patterns.
                for found in self.fs.find(path):
                    self.fs.rm_file(found)
            elif os.path.isdir(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)

    def _make_folder(self, rel: str) -> None:
        if not self.is_local:
            return
        folder = Path(self.path(rel)).parent
        missing = [folder, *folder.parents]
        missing = missing[: next((i for i, path in enumerate(missing) if path.is_dir()), 0)]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{folder}: cannot be created ({error.strerror})") from error
        for made in missing:
            sync_folder(made.parent)

    def _refuse_unconditional(self) -> None:
        if not self._protocols & EXCLUSIVE_PROTOCOLS:
            raise StoreError(
                f"{self.url}: {'/'.join(sorted(self._protocols))} cannot create files "
                "exclusively, so label sets there can be read but not written; use a local path, "
                "s3, gs or abfs"
            )

    @contextlib.contextmanager
    def _required(self, rel: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise MissingError(f"{self.path(rel)}: no such file") from error


def _modified(fs: Any, path: str, entry: dict[str, Any]) -> datetime:
    """Takes the time from the listing, whose keys differ by driver, else from another request."""
    names = ("LastModified", "mtime", "updated", "last_modified", "modified")
    value = next((entry[name] for name in names if entry.get(name)), None)
    if value is None:
        value = fs.modified(path)
    if isinstance(value, int | float):
        return datetime.fromtimestamp(value, UTC)
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    found: datetime = value
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def _link_exclusive(final: Path, data: bytes) -> bool:
    """Creates a file by hard-linking a complete one, which fails if the name exists.

    Opening with O_EXCL and then writing could leave a torn file after a crash.
    """
    temporary = write_temporary(final, data)
    fault_point("before_link")
    try:
        os.link(temporary, final)
        fault_point("after_link")
        created = True
    except OSError as error:
        # Over NFS the response to a successful link can be lost; the retransmitted call then fails.
        created = os.stat(temporary).st_nlink == 2
        if not created and error.errno != errno.EEXIST:
            raise StoreError(
                f"{final}: cannot be created exclusively ({error.strerror}); label sets need a "
                "file system with hard links, or an object store"
            ) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(final.parent)
    return created
