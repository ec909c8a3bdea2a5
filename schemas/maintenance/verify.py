"""`verify`: compares a label set with its manifests and lists every difference.

Reads every byte and checks digests of shards and vocabulary, page checksums, invariants of the
record, row keys, key files against shards, quarantine, and rosters. Continues after a problem, so
that one pass reports all of them.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from schemas.config import StrictModel
from schemas.console.progress import ProgressCallback
from schemas.errors import AccountsError, DamagedError, MissingError, StoreError
from schemas.label_set.description import LABEL_SET_FILE
from schemas.label_set.label_set import LabelSet
from schemas.label_set.manifest import (
    MANIFESTS,
    Manifest,
    manifest_path,
    read_manifest,
    repair,
    unit_of_manifest,
)
from schemas.label_set.roster import finished_runs, read_accounts, roster_path
from schemas.label_set.tables import KEYS, QUARANTINE, parse_table
from schemas.maintenance.verify_shard import ShardCheck
from schemas.storage.store import Store

WORKERS = 4
"""Units checked concurrently; decoding and hashing release the GIL."""


class Problem(StrictModel):
    """A difference between a label set and its manifests.

    Attributes:
        what: category: set, manifest, missing, bytes, pages, record, keys, quarantine or roster.
        file: path in the label set.
        unit_key: affected unit; empty if none.
        row_group: index of the affected row group in the shard; None if none.
        row: index of the affected row in its row group; None if unknown.
        row_key: key of that row, hexadecimal.
        column: damaged column, if known.
        found: what was found and what was expected.
        repair: what to do.
    """

    what: str
    file: str
    unit_key: str = ""
    row_group: int | None = None
    row: int | None = None
    row_key: str = ""
    column: str = ""
    found: str
    repair: str

    def line(self) -> str:
        """Formats place and finding."""
        place = [f"unit {self.unit_key}", self.file] if self.unit_key else [self.file]
        if self.row_group is not None:
            place.append(f"row group {self.row_group}")
        if self.row is not None:
            place.append(f"row {self.row}")
        if self.row_key:
            place.append(f"key {self.row_key}")
        if self.column:
            place.append(f"column {self.column}")
        return f"{', '.join(place)}: {self.found}"


class Verified(StrictModel):
    """Result of `verify`.

    Attributes:
        bytes: total size of the verified shards.
        garbage: number of shards that no manifest names; harmless, `labels gc` deletes them.
    """

    url: str
    fingerprint: str = ""
    units: int = 0
    rows: int = 0
    tokens: int = 0
    labels: int = 0
    quarantined: int = 0
    bytes: int = 0
    garbage: int = 0
    problems: list[Problem]

    @property
    def units_to_drop(self) -> list[str]:
        """Units with problems."""
        return sorted({problem.unit_key for problem in self.problems if problem.unit_key})


def verify(url: str, progress: ProgressCallback | None = None) -> Verified:
    """Verifies everything in a label set.

    Args:
        url: URL of the label set.
        progress: called with the bytes of shards verified so far, and in all.

    Raises:
        StoreError: the label set does not exist, or its store cannot be read.
    """
    store = Store(url)
    try:
        label_set = LabelSet.open(url)
    except DamagedError as error:
        return _unreadable_set(url, store, str(error))
    problems = list(_check_vocabulary(label_set))
    manifests: list[Manifest] = []
    names = store.list(MANIFESTS, ".json")
    for rel in names:
        try:
            manifests.append(read_manifest(store, rel, label_set.fingerprint))
        except (MissingError, DamagedError) as error:
            problems.append(_manifest_problem(store, rel, error))
    total = sum(manifest.size_bytes for manifest in manifests)
    done = 0
    with ThreadPoolExecutor(WORKERS) as pool:
        for manifest, found in zip(
            manifests, pool.map(lambda m: _check_unit(label_set, m), manifests), strict=True
        ):
            problems.extend(found)
            done += manifest.size_bytes
            if progress is not None:
                progress(done, total)
    problems.extend(_check_rosters(label_set))
    shards = {manifest.shard for manifest in manifests}
    return Verified(
        url=url,
        fingerprint=label_set.fingerprint,
        units=len(names),
        rows=sum(manifest.num_rows for manifest in manifests),
        tokens=sum(manifest.num_tokens for manifest in manifests),
        labels=sum(manifest.num_labels for manifest in manifests),
        quarantined=sum(manifest.num_quarantined for manifest in manifests),
        bytes=total,
        garbage=sum(rel not in shards for rel in store.list("shards", ".parquet")),
        problems=problems,
    )


def _unreadable_set(url: str, store: Store, found: str) -> Verified:
    problem = Problem(
        what="set",
        file=LABEL_SET_FILE,
        found=found.removeprefix(f"{store.path(LABEL_SET_FILE)}: "),
        repair=f"restore {store.path(LABEL_SET_FILE)} from a copy; nothing else can be checked",
    )
    return Verified(url=url, problems=[problem])


def _check_vocabulary(label_set: LabelSet) -> Iterator[Problem]:
    name = label_set.vocabulary_file
    if not name:
        return
    try:
        label_set.vocabulary()
    except (MissingError, DamagedError, ValueError) as error:
        yield Problem(
            what="missing" if not label_set.store.exists(name) else "bytes",
            file=name,
            found=_without_path(label_set.store, name, error),
            repair="restore the file from a copy, or export the teacher's vocabulary again",
        )


def _manifest_problem(store: Store, rel: str, error: StoreError) -> Problem:
    unit_key = unit_of_manifest(rel)
    advice = repair(store, unit_key)
    found = _without_path(store, rel, error).removesuffix(f"; {advice}")
    return Problem(what="manifest", file=rel, unit_key=unit_key, found=found, repair=advice)


def _check_unit(label_set: LabelSet, manifest: Manifest) -> list[Problem]:
    """Finds all problems of a unit whose manifest is readable."""
    check = _UnitCheck(label_set, manifest)
    check.manifest()
    keys = None
    if manifest.keys:
        keys = check.table(manifest.keys, "keys", KEYS, manifest.num_rows)
    if manifest.quarantine:
        check.table(manifest.quarantine, "quarantine", QUARANTINE, manifest.num_quarantined)
    if manifest.shard:
        ShardCheck(label_set, manifest, keys, check.report).run()
    return check.problems


class _UnitCheck:
    """Collects the problems of a unit."""

    def __init__(self, label_set: LabelSet, manifest: Manifest) -> None:
        self.store = label_set.store
        self.unit = manifest
        self.problems: list[Problem] = []

    def report(self, what: str, file: str, found: str, **place: object) -> None:
        fields = {"what": what, "file": file, "found": found, "unit_key": self.unit.unit_key}
        fields["repair"] = repair(self.store, self.unit.unit_key)
        self.problems.append(Problem.model_validate(fields | place))

    def manifest(self) -> None:
        """Checks that the manifest is consistent."""
        unit, rel = self.unit, manifest_path(self.unit.unit_key)
        if sum(unit.row_groups) != unit.num_rows:
            found = f"row_groups sum to {sum(unit.row_groups)} rows, num_rows is {unit.num_rows}"
            self.report("manifest", rel, found)
        for name, value, count in (
            ("shard", unit.shard, unit.num_rows),
            ("keys", unit.keys, unit.num_rows),
            ("quarantine", unit.quarantine, unit.num_quarantined),
        ):
            if bool(value) != bool(count):
                found = f"{name} is {value!r}, but its number of rows is {count}"
                self.report("manifest", rel, found)

    def table(self, rel: str, what: str, schema: object, num_rows: int) -> object:
        """Reads a small table of the unit; None if it is missing or damaged."""
        try:
            table = parse_table(self.store.read_bytes(rel), schema)
        except MissingError:
            self.report("missing", rel, "no such file, but the manifest names it")
            return None
        except DamagedError as error:
            self.report(what, rel, _without_path(self.store, rel, error))
            return None
        if len(table) != num_rows:
            self.report(what, rel, f"has {len(table)} rows, the manifest records {num_rows}")
            return None
        return table


def _check_rosters(label_set: LabelSet) -> Iterator[Problem]:
    for run in finished_runs(label_set):
        rel = roster_path(run)
        try:
            read_accounts(label_set, run).check()
        except (MissingError, DamagedError, AccountsError, ValueError) as error:
            yield Problem(
                what="roster",
                file=rel,
                found=_without_path(label_set.store, rel, error),
                repair=f"delete {label_set.store.path(rel)} and run the label job again: it "
                "relabels nothing and writes a new roster",
            )


def _without_path(store: Store, rel: str, error: Exception) -> str:
    text = str(error).replace("\n", " ")
    prefix = f"{store.path(rel)}: "
    while text.startswith(prefix):
        text = text.removeprefix(prefix)
    return text
