"""Files behind one URL, through fsspec, and the two ways to create one that a crash cannot tear.

`Store.write_bytes` replaces a file as a whole. `Store.create_exclusive` makes a file that is not
there yet, as a whole, for exactly one of any number of writers: the commit of this project.

A local path and its ``file://`` URL are the same store. What fails in a way that passes is tried
again where `schemas.storage.retry` says so; what a driver fails with in the end is a `StoreError`.
"""

import contextlib
import errno
import os
import shutil
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import fsspec

from schemas.errors import MissingError, StoreError
from schemas.fault_points import fault_point
from schemas.storage.driver_errors import GuardedFile, store_errors, store_failure
from schemas.storage.retry import retried

# Stores whose fsspec driver turns mode "create" into one conditional request (`memory` lives in one
# process). Elsewhere it is a look and then a write, which two writers can both pass.
EXCLUSIVE_PROTOCOLS = frozenset(
    {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "azure", "memory"}
)
TEMPORARY_PREFIX = ".writing-"
# What brings the driver of a protocol.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"} | dict.fromkeys(
    ("abfs", "abfss", "az", "adl", "azure"), "azure"
)


@dataclass(frozen=True)
class StoredFile:
    """A file as a listing shows it.

    Attributes:
        rel: path in the store.
        size_bytes: its length.
        modified: when it was last written to.
    """

    rel: str
    size_bytes: int
    modified: datetime


class Store:
    """A folder on any file system that fsspec knows; `rel` paths in it use forward slashes.

    Attributes:
        url: as it was given.
        fs: the fsspec file system.
        root: the folder, as `fs` names it.
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
        """Whether the files are this machine's own."""
        return "file" in self._protocols

    def path(self, *parts: str) -> str:
        """The full path of a file, as `fs` names it."""
        return "/".join((self.root.rstrip("/"), *parts)) if parts else self.root

    @retried
    def exists(self, rel: str = "") -> bool:
        """Whether the file is there; without a path, whether anything is."""
        return bool(self.fs.exists(self.path(rel) if rel else self.root))

    @retried
    def size(self, rel: str) -> int:
        """Its length in bytes.

        Raises:
            MissingError: it is not there.
        """
        try:
            return int(self.fs.size(self.path(rel)))
        except FileNotFoundError as error:
            raise self._not_there(rel) from error

    @retried
    def read_bytes(self, rel: str) -> bytes:
        """The whole file.

        Raises:
            MissingError: it is not there.
        """
        try:
            return bytes(self.fs.cat_file(self.path(rel)))
        except FileNotFoundError as error:
            raise self._not_there(rel) from error

    @retried
    def open(self, rel: str, mode: str = "rb") -> IO[bytes]:
        """The file, opened; for writing its folder is made. `sync` makes what was written last.

        Raises:
            MissingError: it is to be read and is not there.
        """
        if "r" not in mode:
            self._make_folder(rel)
        try:
            if self.is_local:
                return open(self.path(rel), mode)
            file: Any = GuardedFile(
                self.fs.open(self.path(rel), mode), f"{self.url.rstrip('/')}/{rel}"
            )
            return file
        except FileNotFoundError as error:
            raise self._not_there(rel) from error

    @retried
    def sync(self, rel: str) -> None:
        """Makes a file that was just written, and its name, survive a power cut."""
        if self.is_local:
            with open(self.path(rel), "rb") as file:
                os.fsync(file.fileno())
            _sync_folder(Path(self.path(rel)).parent)

    @retried
    def write_bytes(self, rel: str, data: bytes) -> None:
        """Writes or replaces a file as a whole: readers see the old content or the new."""
        self._make_folder(rel)
        if not self.is_local:
            self.fs.pipe_file(self.path(rel), data)
            return
        final = Path(self.path(rel))
        temporary = _write_temporary(final, data)
        try:
            os.replace(temporary, final)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(final.parent)

    @retried
    def create_exclusive(self, rel: str, data: bytes) -> bool:
        """Creates a file as a whole if it is not there. Of all writers, exactly one gets True.

        Writers have to differ in `data`, for example by an attempt id: on an object store a
        request that is repeated after a lost answer may meet its own success, which only reading
        back shows.

        Returns:
            True: this call created it. False: it was there; its content is untouched.

        Raises:
            StoreError: the store cannot create exclusively, or could not be written to.
        """
        self._make_folder(rel)
        if self.is_local:
            return _link_exclusive(Path(self.path(rel)), data)
        self._refuse_unconditional()
        try:
            self.fs.pipe_file(self.path(rel), data, mode="create")
        except Exception as error:  # noqa: BLE001  # whatever went wrong, the file itself says what came of it
            try:
                found = self.read_bytes(rel)
            except StoreError:
                raise store_failure(error, self.path(rel), "cannot be created") from error
            return found == data
        return True

    def probe_exclusive(self) -> None:
        """Shows, on an object store, that it honours conditional writes.

        Raises:
            StoreError: a second creation of one file succeeded, or nothing can be written.
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
        """Every file below a folder, temporary ones included, by path; none where it is not there.

        Files that go away meanwhile may be missing.
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
        """Relative paths of the folders right under a folder, sorted."""
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
        """Relative paths of the files right under a folder, sorted; none where it is not there."""
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
        """Removes a file, or a folder with all that is in it; it is fine if it is not there."""
        path = self.path(rel)
        with contextlib.suppress(FileNotFoundError):
            if not self.is_local:
                # Not fs.rm, which would take a bracket in a name for a pattern.
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
            raise StoreError(f"{folder}: cannot be made ({error.strerror})") from error
        for made in missing:
            _sync_folder(made.parent)

    def _refuse_unconditional(self) -> None:
        if not self._protocols & EXCLUSIVE_PROTOCOLS:
            raise StoreError(
                f"{self.url}: {'/'.join(sorted(self._protocols))} cannot create a file for exactly "
                "one of several writers, so it can be read from but not written to; use a local "
                "path, s3, gs or abfs"
            )

    def _not_there(self, rel: str) -> MissingError:
        return MissingError(f"{self.path(rel)}: there is no such file")


def _modified(fs: Any, path: str, entry: dict[str, Any]) -> datetime:
    """From a listing, whose key differs from store to store; else by asking for it."""
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


def _write_temporary(final: Path, data: bytes) -> Path:
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


def _link_exclusive(final: Path, data: bytes) -> bool:
    """The hard link is the one step that both puts the whole file there and fails if it was there.

    Opening with O_EXCL and then writing would leave a torn file after a crash.
    """
    temporary = _write_temporary(final, data)
    fault_point("before_link")
    try:
        os.link(temporary, final)
        fault_point("after_link")
        created = True
    except OSError as error:
        # Over NFS the answer to a link that was made can be lost, and the repeated call then fails.
        created = os.stat(temporary).st_nlink == 2
        if not created and error.errno != errno.EEXIST:
            raise StoreError(
                f"{final}: cannot be created exclusively ({error.strerror}); label sets need a "
                "file system with hard links, or an object store"
            ) from error
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(final.parent)
    return created


def _sync_folder(folder: Path) -> None:
    handle: Any = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
