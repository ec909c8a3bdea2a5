"""Label jobs whose processes are killed, stopped and preempted, and the account of what that cost.

A ``FaultRun`` is one label set that many jobs work on, one after another, each of them disturbed.
All choices come from one seed. Every fault is a line of its table; at the end the label set is
compared with one that nothing has disturbed.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil

from schemas.fault_points import FOLDER_VARIABLE
from schemas.label_set.description import LABEL_SET_FILE
from schemas.label_set.label_set import LabelSet
from schemas.maintenance.verify import verify
from schemas.record.rows import LabelRows
from tests.support import ROOT

TEACHER = ROOT / "examples" / "teacher"
TEACHER_POINTS = (
    "shard_half_written",
    "shard_written",
    "shard_synced",
    "before_manifest",
    "before_link",
    "after_link",
    "before_report",
)
"""Points at which a teacher's process may die between labelling and committing a unit."""

JOB_POINTS = ("before_roster", "after_roster")
LOGPROB_TOLERANCE = 1e-3
LOGPROB_BITS = 6  # the default of the record
UNLIKE_POSITIONS = 0.01
_POLL_S = 0.02
_LIMIT_S = 240.0


@dataclass
class Fault:
    """One line of the table.

    Attributes:
        fault: What was done to which process.
        when: At which moment.
        committed: Rows that were committed when it was over.
        open_shards: Shards so far whose unit was not committed; `labels gc` takes them away.
        lost, doubled: Of the committed rows, how many are gone or there twice in the end.
    """

    fault: str
    when: str
    committed: int
    open_shards: int
    lost: int = -1
    doubled: int = -1


class FaultRun:
    """A label set, its jobs, and what happened to them."""

    def __init__(self, folder: Path, seed: int, num_rows: int, address: str = "") -> None:
        """Prepares a corpus.

        Args:
            folder: For everything.
            seed: Decides when faults happen, and the corpus.
            num_rows: Documents of the corpus, about one row each.
            address: Of a Ray cluster; empty: each job starts its own.
        """
        print(f"seed {seed}")
        self.table: list[Fault] = []
        self.folder = folder
        self.rng = random.Random(seed)
        self._address = address
        self._kept: list[np.ndarray] = []
        self._points = Path(os.environ[FOLDER_VARIABLE])
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"text": self._text(number)}) + "\n" for number in range(num_rows)]
        (folder / "corpus.jsonl").write_text("".join(lines))

    def _text(self, number: int) -> str:
        lines = [f"def function{number}(a, b):"]
        for _ in range(self.rng.randrange(1, 9)):
            lines.append(f"    a = b * {self.rng.randrange(99)} + a[{self.rng.randrange(9)}]")
        return "\n".join([*lines, "    return a", ""])

    def url(self, name: str = "labels") -> str:
        """Of the label set; another name is another set of the same corpus."""
        return str(self.folder / name)

    def config(self, labels: str, **run: object) -> Path:
        """Writes a job's config; ``run`` has additional settings of ``[run]``."""
        settings = {"unit_rows": 2, "stall_s": 120.0, "num_cpus": 2, **run}
        if self._address:
            settings["address"] = self._address
        path = self.folder / "label.toml"
        path.write_text(
            f"labels = {json.dumps(labels)}\n"
            f"[corpus]\npath = {json.dumps(str(self.folder / 'corpus.jsonl'))}\n"
            'format = "jsonl"\npiece_bytes = 20000\n'
            "[text]\nmax_tokens = 128\noverlap = 16\n"
            f'[teacher]\nbackend = "transformers"\nmodel = {json.dumps(str(TEACHER))}\n'
            'dtype = "float32"\n[record]\nkind = "threshold"\ntau = 0.047\n'
            "[gates]\nparity_rows = 0\n[run]\n"
            + "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
        )
        return path

    @contextmanager
    def job(
        self, *words: str, labels: str = "labels", environment: dict[str, str] | None = None
    ) -> Iterator["Job"]:
        """Starts a job; kills whatever is left of it at the end of the block."""
        known = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        log = self.folder / "job.log"
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "cluster", "label", self.config(self.url(labels)), *words],
                cwd=ROOT,
                env={**known, "PYTHONPATH": str(ROOT), **(environment or {})},
                stdout=output,
                stderr=output,
            )
        job = Job(process, Path(self.url(labels)), log)
        try:
            yield job
        finally:
            kill_tree(process)

    def note(self, fault: str, when: str) -> None:
        """Records what is committed after a fault, to check for it at the end."""
        keys, open_shards = np.empty(0, "S16"), 0
        if (self.folder / "labels" / LABEL_SET_FILE).exists():
            labels = LabelSet.open(self.url())
            keys, manifests = labels.committed_keys(), labels.manifests()
            shards = len(labels.store.list("shards", ".parquet"))
            open_shards = max(0, shards - sum(bool(manifest.shard) for manifest in manifests))
        self._kept.append(keys)
        self.table.append(Fault(fault, when, len(keys), open_shards))
        print(f"{len(self.table):3} {fault:34} {when:44} {len(keys):6,} rows committed")

    # Faults

    def kill_job(self, job: "Job") -> None:
        """Sends SIGKILL to the job after a few units, or while it starts."""
        units = self.rng.choice((0, 1, 1, 3, 6))
        delay_s = self.rng.uniform(0.0, 4.0 if not units else 0.3)
        job.wait_for_units(units)
        time.sleep(delay_s)
        job.kill(signal.SIGKILL)
        job.process.wait()
        self.note("SIGKILL of the job", f"{delay_s:.2f}s after {units} units of its own")

    def stop_job(self, job: "Job", number: signal.Signals) -> None:
        """Sends a signal to stop the job, which first commits all units in flight."""
        units = self.rng.randrange(1, 6)
        job.wait_for_units(units)
        job.kill(number)
        code = job.process.wait(timeout=_LIMIT_S)
        assert code == 128 + number, f"ended with {code}: {job.last_lines()}"
        assert "run the same command again to resume" in job.last_lines()
        self.note(f"{number.name} of the job", f"after {units} units; exit code {code}")

    def kill_teacher(self, job: "Job") -> None:
        """Sends SIGKILL to the teacher's process after a few units, or while it starts."""
        job.wait_for_teacher()
        units = self.rng.choice((0, 1, 2, 5))
        delay_s = self.rng.uniform(0.0, 2.0 if not units else 0.2)
        job.wait_for_units(units)
        time.sleep(delay_s)
        for process in job.wait_for_teacher():
            process.kill()
        self.note("SIGKILL of the teacher actor", f"{delay_s:.2f}s after {units} more units")

    def kill_at(self, point: str, job: "Job", what: str) -> None:
        """Kills the next process to reach a fault point."""
        if point in TEACHER_POINTS:
            job.wait_for_units(1)  # the job itself links a file when it makes the label set
        (self._points / point).touch()
        job.wait_until(lambda: not (self._points / point).exists(), f"nobody came by {point}")
        self.note(f"SIGKILL of the {what}", f"at {point}")

    def signal_engine(self, job: "Job", number: signal.Signals) -> None:
        """Sends a signal to the engine's process."""
        units = self.rng.choice((1, 2, 4))
        job.wait_for_units(units)
        delay_s = self.rng.uniform(0.0, 0.3)
        time.sleep(delay_s)
        engines = job.wait_for_engine()
        for process in engines:
            process.send_signal(number)
        job.wait_until(lambda: not any(map(_is_alive, engines)), "nobody ends the engine")
        self.note(
            f"{number.name} of the engine process",
            f"{delay_s:.2f}s after {units} more units",
        )

    # The end

    def settle(self, reference: str = "undisturbed") -> str:
        """Lets a last job finish, checks everything, and returns the table as Markdown."""
        with self.job("run.unit_rows=64", "--json", str(self.folder / "last.json")) as job:
            job.finish()
        with self.job("run.unit_rows=64", labels=reference) as job:
            job.finish()
        summary = json.loads((self.folder / "last.json").read_text())
        parts = ("labelled", "reused", "duplicate", "quarantined")
        assert summary["rows_read"] == sum(summary[f"rows_{part}"] for part in parts)
        assert summary["rows_quarantined"] == 0, summary["reasons"]
        labels, undisturbed = (LabelSet.open(self.url(name)) for name in ("labels", reference))
        verified = verify(self.url())
        assert not verified.problems, verified.problems
        keys = labels.committed_keys()
        np.testing.assert_array_equal(keys, undisturbed.committed_keys())
        copies = sum(manifest.num_rows for manifest in labels.manifests())
        for fault, kept in zip(self.table, self._kept, strict=True):
            fault.lost = int((~np.isin(kept, keys)).sum())
            fault.doubled = copies - len(keys)
        compare(labels, undisturbed)
        return self._markdown()

    def _markdown(self) -> str:
        head = "| # | fault | when | rows committed | open shards | rows lost | rows doubled |"
        lines = [head, "|---|---|---|---|---|---|---|"]
        for number, fault in enumerate(self.table, 1):
            cells = [str(value) for value in asdict(fault).values()]
            lines.append(f"| {number} | {' | '.join(cells)} |")
        return "\n".join(lines)


class Job:
    """A running `tutelage label`."""

    def __init__(self, process: "subprocess.Popen[bytes]", labels: Path, log: Path) -> None:
        self.process = process
        self._manifests = labels / "manifests"
        self._log = log
        self._seen = self._units()

    def _units(self) -> int:
        return sum(1 for name in _names(self._manifests) if name.endswith(".json"))

    def wait_until(self, condition: Callable[[], object], problem: str) -> None:
        """Waits while the job runs."""
        end = time.monotonic() + _LIMIT_S
        while not condition():
            assert self.process.poll() is None, f"{problem}: the job ended\n{self.last_lines()}"
            assert time.monotonic() < end, f"{problem} in {_LIMIT_S:.0f}s\n{self.last_lines()}"
            time.sleep(_POLL_S)

    def wait_for_units(self, count: int) -> None:
        """Waits until so many units more are committed than when this was called last."""
        wanted = self._seen + count
        self.wait_until(lambda: self._units() >= wanted, f"no {count} units more")
        self._seen = self._units()

    def wait_for_teacher(self) -> list[psutil.Process]:
        """Processes of the teacher actors, at least one."""
        return self._wait_for("TeacherActor")

    def wait_for_engine(self) -> list[psutil.Process]:
        """Processes of the engines, at least one."""
        return self._wait_for("EngineCore")

    def _wait_for(self, name: str) -> list[psutil.Process]:
        found: list[psutil.Process] = []

        def look() -> bool:
            found[:] = _processes(name)
            return bool(found)

        self.wait_until(look, f"no process {name}")
        return found

    def kill(self, number: signal.Signals) -> None:
        """Sends a signal to the job's own process."""
        self.process.send_signal(number)

    def finish(self) -> None:
        """Waits for the job to succeed."""
        code = self.process.wait(timeout=_LIMIT_S)
        assert code == 0, f"ended with {code}: {self.last_lines()}"

    def last_lines(self) -> str:
        """The last lines of its output."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-12:])


def compare(one: LabelSet, other: LabelSet) -> None:
    """Checks that two sets with the same rows have the same teacher's labels.

    Raises:
        AssertionError: Ids differ in more than a small share of the positions, or log-probabilities
            of the same ids by more than the tolerance and a step of rounding.
    """
    mine, theirs = (_sorted_rows(labels) for labels in (one, other))
    np.testing.assert_array_equal(mine.token_ids, theirs.token_ids)
    np.testing.assert_array_equal(mine.label_spans, theirs.label_spans)
    same_count = (mine.head_len == theirs.head_len) & (mine.tail_len == theirs.tail_len)
    unlike, compared, largest = int((~same_count).sum()), 0, 0.0
    assert mine.entry_offsets is not None
    assert theirs.entry_offsets is not None
    for position in np.flatnonzero(same_count):
        a, b = (slice(*rows.entry_offsets[position : position + 2]) for rows in (mine, theirs))
        if not np.array_equal(mine.entry_ids[a], theirs.entry_ids[b]):
            unlike += 1
            continue
        x = mine.entry_logprobs[a].astype(np.float64)
        y = theirs.entry_logprobs[b].astype(np.float64)
        step = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(x), 2.0**-14))) - LOGPROB_BITS)
        excess = np.abs(x - y) - step
        largest = max(largest, float(np.abs(x - y).max(initial=0.0)))
        assert (excess <= LOGPROB_TOLERANCE).all(), (position, x, y)
        compared += 1
    share = unlike / len(same_count)
    print(f"{compared:,} positions alike to {largest:.1e} nats; {unlike} unlike ({share:.2%})")
    assert share <= UNLIKE_POSITIONS


def _sorted_rows(labels: LabelSet) -> LabelRows:
    index = labels.index()
    order = np.argsort(np.array(index.column("row_key").to_pylist()))
    return labels.read_rows(index.take(order))


def _processes(name: str) -> list[psutil.Process]:
    """Of what this process has started, those with this in their title."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if name in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill_tree(process: "subprocess.Popen[bytes]") -> None:
    """Kills a process and all its descendants."""
    try:
        root = psutil.Process(process.pid)
        tree = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        tree = []
    for member in tree:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(tree, timeout=10)
    process.wait()


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
