"""`verify`: shows that a label set is what its manifests say, or lists everything that is not.

Every byte is read: the digests of shards and vocabulary, the checksum of every page, every
invariant of the record, the identity of every row, key files against shards, quarantine, rosters.
It goes on after a problem, so that one pass says all there is to mend.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from schemas.config import StrictModel
from schemas.errors import AccountsError, DamagedError, MissingError, StoreError
from schemas.label_set.description import LABEL_SET_FILE
from schemas.label_set.label_set import LabelSet
from schemas.label_set.manifest import MANIFESTS, Manifest, read_manifest, repair
from schemas.label_set.roster import finished_runs, read_accounts, roster_path
from schemas.label_set.tables import KEYS, QUARANTINE, parse_table
from schemas.maintenance.verify_shard import ShardCheck
from schemas.storage.store import Store

WORKERS = 4
"""Units that are checked at the same time: decoding and hashing run outside of Python's lock."""


class Problem(StrictModel):
    """One thing that is wrong.

    Attributes:
        what: one word to count by: set, manifest, missing, bytes, pages, record, keys, quarantine,
            roster.
        file: path in the label set.
        unit_key: of the unit; empty where it is not about one.
        row_group: in the shard, from 0; None where it is not about one.
        row: in its row group, from 0; None where it cannot be said more exactly.
        row_key: of that row, hexadecimal.
        column: that is damaged, where one is known to be.
        found: what was found, and what was expected.
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
        """For people: where, and what was found."""
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
    """What was checked, and what was found wrong.

    Attributes:
        bytes: read and checked, of all files.
        garbage: shards that no manifest names; no problem, `labels gc` removes them.
    """

    url: str
    fingerprint: str
    units: int
    rows: int
    tokens: int
    labels: int
    quarantined: int
    bytes: int
    garbage: int
    problems: list[Problem]

    @property
    def units_to_drop(self) -> list[str]:
        """Units with a problem, each once."""
        return sorted({problem.unit_key for problem in self.problems if problem.unit_key})


def verify(url: str, progress: Callable[[int, int], None] | None = None) -> Verified:
    """Checks everything that a label set holds.

    Args:
        url: of the label set.
        progress: called with the bytes of shards that are checked and those that there are.

    Raises:
        StoreError: there is no label set, or its store does not give what it has.
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
    counts = dict.fromkeys(("units", "rows", "tokens", "labels", "quarantined", "bytes"), 0)
    return Verified(url=url, fingerprint="", garbage=0, problems=[problem], **counts)


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
            repair="restore the file from a copy, or take the vocabulary from the teacher again",
        )


def _manifest_problem(store: Store, rel: str, error: StoreError) -> Problem:
    unit_key = rel.rsplit("/", 1)[-1].removesuffix(".json")
    advice = repair(store, unit_key)
    found = _without_path(store, rel, error).removesuffix(f"; {advice}")
    return Problem(what="manifest", file=rel, unit_key=unit_key, found=found, repair=advice)


def _check_unit(label_set: LabelSet, manifest: Manifest) -> list[Problem]:
    """All problems of one unit whose manifest could be read."""
    check = _Unit(label_set, manifest)
    check.manifest_itself()
    keys = None
    if manifest.keys:
        keys = check.table(manifest.keys, "keys", KEYS, manifest.num_rows)
    if manifest.quarantine:
        check.table(manifest.quarantine, "quarantine", QUARANTINE, manifest.num_quarantined)
    if manifest.shard:
        shard = ShardCheck(label_set, manifest, keys, check.report)
        shard.run()
    return check.problems


class _Unit:
    """Problems of one unit, as they are found."""

    def __init__(self, label_set: LabelSet, manifest: Manifest) -> None:
        self.store = label_set.store
        self.unit = manifest
        self.problems: list[Problem] = []

    def report(self, what: str, file: str, found: str, **place: object) -> None:
        fields = {"what": what, "file": file, "found": found, "unit_key": self.unit.unit_key}
        fields["repair"] = repair(self.store, self.unit.unit_key)
        self.problems.append(Problem.model_validate(fields | place))

    def manifest_itself(self) -> None:
        """What a manifest says fits together."""
        unit, rel = self.unit, f"{MANIFESTS}/{self.unit.unit_key}.json"
        if sum(unit.row_groups) != unit.num_rows:
            self.report(
                "manifest", rel, f"row_groups make {sum(unit.row_groups)} rows, num_rows says "
                f"{unit.num_rows}",
            )  # fmt: skip
        for name, value, count in (
            ("shard", unit.shard, unit.num_rows),
            ("keys", unit.keys, unit.num_rows),
            ("quarantine", unit.quarantine, unit.num_quarantined),
        ):
            if bool(value) != bool(count):
                found = f"{name} is {value!r}, but there are {count} rows of it"
                self.report("manifest", rel, found)

    def table(self, rel: str, what: str, schema: object, num_rows: int) -> object:
        """A small table of the unit; None where it is not what it has to be."""
        if not self.store.exists(rel):
            self.report("missing", rel, "there is no such file, though the manifest names it")
            return None
        try:
            table = parse_table(self.store.read_bytes(rel), schema)
        except (MissingError, DamagedError) as error:
            self.report(what, rel, _without_path(self.store, rel, error))
            return None
        if len(table) != num_rows:
            self.report(what, rel, f"holds {len(table)} rows, the manifest says {num_rows}")
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
                repair=f"delete {label_set.store.path(rel)} and run the label job again: it labels "
                "nothing anew and writes a roster of its own",
            )


def _without_path(store: Store, rel: str, error: Exception) -> str:
    text = str(error).replace("\n", " ")
    prefix = f"{store.path(rel)}: "
    while text.startswith(prefix):
        text = text.removeprefix(prefix)
    return text
