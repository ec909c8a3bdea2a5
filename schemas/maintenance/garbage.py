"""Garbage: files that no manifest names, left by failed attempts and dropped units.

Considers only kinds of files that label sets create, and only files older than any unit takes to
write, because a unit in progress has no manifest yet. A run may last for days and needs all parts
of its roster at the end, so files of runs count as old only if nothing was committed to the set for
that long.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from schemas.config import StrictModel
from schemas.console.progress import ProgressCallback
from schemas.errors import ConfigError
from schemas.label_set.label_set import LabelSet
from schemas.storage.local_files import TEMPORARY_PREFIX
from schemas.storage.store import Store, StoredFile

_ENDED_RUN = "of a run that ended"
_FOLDERS = ("shards", "keys", "quarantine", "attempts", "rosters", "manifests")


class GarbageFile(StrictModel):
    """A file that nothing needs.

    Attributes:
        file: path in the label set.
        why: why nothing needs it, in a few words.
        age_hours: hours since it was last written.
    """

    file: str
    why: str
    size_bytes: int
    age_hours: float


class Garbage(StrictModel):
    """Result of a collection.

    Attributes:
        too_young: number of unnamed files that may belong to a unit in progress.
        deleted: whether `files` were deleted.
    """

    url: str
    older_than_hours: float
    files: list[GarbageFile]
    too_young: int
    deleted: bool

    @property
    def size_bytes(self) -> int:
        """Total size of `files`."""
        return sum(file.size_bytes for file in self.files)


def collect_garbage(
    url: str,
    older_than_hours: float,
    delete: bool = False,
    now: datetime | None = None,
    progress: ProgressCallback | None = None,
) -> Garbage:
    """Finds, and optionally deletes, files that no manifest names.

    Args:
        url: URL of the label set.
        older_than_hours: keeps younger files; must exceed the time a unit takes.
        delete: whether to delete the files.
        now: current time; for tests.
        progress: called with the number of files deleted so far, and to delete in all.

    Raises:
        ConfigError: the age is negative.
        StoreError: the label set does not exist.
        DamagedError: a manifest cannot be read, so the files it names are unknown.
    """
    if older_than_hours < 0:
        raise ConfigError(f"--older-than is {older_than_hours}; expected hours, 0 or more")
    label_set = LabelSet.open(url)
    now = now or datetime.now(UTC)
    # Files first, then manifests: the files of a unit committed in between are then seen as named.
    stored = list(_files(label_set.store))
    named = _named(label_set)
    unnamed = [(file, _why(file.rel)) for file in stored if file.rel not in named]
    garbage = [(file, why) for file, why in unnamed if why]
    last_activity = _last_run_activity(stored)
    least = timedelta(hours=older_than_hours)
    old = [
        (file, why)
        for file, why in garbage
        if now - max(file.modified, last_activity if why == _ENDED_RUN else file.modified) >= least
    ]
    if delete:
        for number, (file, _) in enumerate(old, start=1):
            label_set.store.delete(file.rel)
            if progress is not None:
                progress(number, len(old))
    return Garbage(
        url=url,
        older_than_hours=older_than_hours,
        files=[
            GarbageFile(
                file=file.rel,
                why=why,
                size_bytes=file.size_bytes,
                age_hours=round((now - file.modified).total_seconds() / 3600, 2),
            )
            for file, why in old
        ],
        too_young=len(garbage) - len(old),
        deleted=delete,
    )


def _files(store: Store) -> Iterator[StoredFile]:
    for folder in _FOLDERS:
        yield from store.walk(folder)
    for rel in store.list("", ".json"):
        name = rel.lstrip("/")
        if name.startswith("vocabulary-"):
            yield from store.walk(name)


def _last_run_activity(stored: list[StoredFile]) -> datetime:
    """Time of the last activity of any run: a commit, a roster part, an attempt at a row."""
    times = [
        file.modified
        for file in stored
        if file.rel.startswith(("manifests/", "attempts/")) or ".parts/" in file.rel
    ]
    return max(times, default=datetime.fromtimestamp(0, UTC))


def _named(label_set: LabelSet) -> set[str]:
    names = {label_set.vocabulary_file}
    for manifest in label_set.manifests():
        names.update((manifest.shard, manifest.keys, manifest.quarantine))
    return names


def _why(rel: str) -> str:
    """Why a file that no manifest names is garbage; empty if it is not."""
    folder, _, rest = rel.partition("/")
    if rest.rsplit("/", 1)[-1].startswith(TEMPORARY_PREFIX):
        return "never finished"
    if folder in ("shards", "keys", "quarantine"):
        return "no manifest names it"
    if folder == "attempts" or (folder == "rosters" and ".parts/" in rest):
        return _ENDED_RUN
    if not rest and rel.startswith("vocabulary-"):
        return "another vocabulary"
    return ""  # manifests and rosters
