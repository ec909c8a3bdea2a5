"""Labels requests, restarts crashed engines and isolates the rows that crash them.

A row that crashes its engine must not end the job, be retried forever, or fail other rows:

1. Units without a recorded crash share an engine, if it is shareable, so that it never idles. If it
   crashes, any in-flight unit may be the cause: each is retried on a fresh engine of its own, and
   only a crash there counts against its rows.
2. If two engines crash on the same rows, at least once while running only those rows, the batch is
   split in half. Each half is retried on a fresh engine, until the faulty row is isolated.
3. A single row is quarantined once it has crashed two fresh engines on its own and a canary row
   passes on another. If the canary fails too, the engine itself is broken, and the job ends.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from labeler.corpus.requests import Request, requests_unit_key
from labeler.supervision.attempts import Attempts, CrashCounts
from labeler.supervision.shared_lock import SharedLock
from labeler.supervision.watchdog import Watchdog
from labeler.teachers.canary import label_canary
from labeler.teachers.protocol import Teacher, WakeableTeacher
from labeler.units.unit_labels import UnitLabels, label_requests
from labeler.units.unit_progress import UnitProgress
from schemas.errors import RowFailure, TeacherError, TeacherGoneError, first_line
from schemas.spec import GenerationSpec

T = TypeVar("T")

MAX_BLAMELESS_CRASHES = 3
"""Crashes in one phase, none caused by a row, after which the run fails."""

MAX_KILLED = 20
"""Consecutive engines killed from outside, after which the run fails."""

CRASHES_TO_BLAME = 2
"""Engine crashes on the same rows before the rows are blamed."""

_START = "start"
_CANARY = "canary"
_PARITY = "parity"
_PHASES = {
    _START: "while starting",
    _CANARY: "on a row of two tokens",
    _PARITY: "during the parity check",
}


def _ignore(_: str) -> None:
    pass


class EngineSupervisor:
    """Labels requests, restarting the engine when it crashes.

    The engine starts lazily, on the first requests: a run with nothing to do starts none.
    Thread-safe; concurrent calls share the engine if it is ``shareable``.
    """

    def __init__(
        self,
        make_teacher: Callable[[], Teacher],
        attempts: Attempts,
        generation: GenerationSpec | None,
        audit_rate: float = 0.0,
        watchdog: Watchdog | None = None,
        say: Callable[[str], None] = _ignore,
    ) -> None:
        """
        Args:
            make_teacher: starts an engine.
            attempts: records of the rows that engines are working on.
            generation, audit_rate: see ``label_requests``.
            watchdog: kills hanging engines; None: they may hang forever.
            say: called with one line after each engine crash.
        """
        self._make_teacher = make_teacher
        self._attempts = attempts
        self._generation = generation
        self._audit_rate = audit_rate
        self._watchdog = watchdog or Watchdog(math.inf)
        self._say = say
        self._num_killed = 0
        self._teacher: Teacher | None = None
        self._lock = SharedLock()  # exclusive while an engine is started or dropped

    def label(
        self, requests: Sequence[Request], progress: UnitProgress | None = None
    ) -> tuple[UnitLabels, dict[str, object]]:
        """Labels or quarantines each request; also returns the provenance of the labels.

        Raises:
            TeacherError: no engine starts, or engines crash regardless of the rows.
        """
        batch = list(requests)
        if not self._attempts.count_crashes(requests_unit_key(batch)).total:
            labeled = self._label_shared(batch, progress)
            if labeled is not None:
                return labeled
        with self._lock.exclusive():
            labels = self._label_exclusively(batch, progress, suspected=False)
            return labels, self._running_teacher().provenance()

    def run_exclusively(self, task: Callable[[Teacher], T]) -> T:
        """Runs the parity check, or part of it, with exclusive use of the teacher.

        Raises:
            TeacherError: no engine starts, or engines crash during the check.
        """
        with self._lock.exclusive():
            return self._run_blameless(_PARITY, task)

    def _label_shared(
        self, requests: list[Request], progress: UnitProgress | None
    ) -> tuple[UnitLabels, dict[str, object]] | None:
        """Labels requests on the shared engine; None if they must be retried exclusively."""
        # A loop, because another thread may drop the engine between the two locks.
        while self._teacher is None:
            with self._lock.exclusive():
                self._running_teacher()
        with self._lock.shared():
            teacher = self._teacher
            if teacher is None or not teacher.shareable:
                return None
            result = self._label_once(requests, teacher, progress, alone=False)
            if isinstance(result, UnitLabels):
                return result, teacher.provenance()
        # Every call that shared the engine has failed by now; the first to get here drops it.
        with self._lock.exclusive():
            if self._teacher is teacher:
                self._drop(result)
        return None

    def _label_exclusively(
        self, requests: list[Request], progress: UnitProgress | None, suspected: bool
    ) -> UnitLabels:
        """Labels requests on an exclusive engine, halving the batch while it crashes the engine.

        Args:
            requests: one or more.
            progress: progress of their unit.
            suspected: whether they are half of a batch that crashed engines.
        """
        key = requests_unit_key(requests)
        is_single = len(requests) == 1
        crashes, last = self._attempts.count_crashes(key), None
        while not _rows_are_to_blame(crashes, suspected, is_single):
            result = self._label_once(requests, self._running_teacher(), progress)
            if isinstance(result, UnitLabels):
                return result
            self._drop(result)
            crashes, last = self._attempts.count_crashes(key), result
        # Without this check, an engine that fails on every row would quarantine the whole corpus.
        self._check_canary()
        if is_single:
            detail = f"{crashes.alone} engines crashed on this row alone{_last_crash(last)}"
            return UnitLabels([], [], [requests[0].quarantined("kills_engine", detail)])
        middle = len(requests) // 2
        first = self._label_exclusively(requests[:middle], progress, suspected=True)
        return first.joined(self._label_exclusively(requests[middle:], progress, suspected=True))

    def _label_once(
        self,
        requests: list[Request],
        teacher: Teacher,
        progress: UnitProgress | None,
        alone: bool = True,
    ) -> UnitLabels | TeacherError:
        """Makes one attempt to label requests; returns their labels or the crash error."""
        return self._attempt(
            requests_unit_key(requests),
            lambda: label_requests(requests, teacher, self._generation, self._audit_rate, progress),
            alone,
        )

    def _check_canary(self) -> None:
        """Labels a row of two tokens.

        Raises:
            TeacherError: the teacher cannot label it.
        """
        result = self._run_blameless(_CANARY, label_canary)
        if isinstance(result, RowFailure):
            raise TeacherError(
                f"the teacher cannot label a row of two tokens: {result.reason} ({result.detail})"
            )

    def _run_blameless(self, phase: str, task: Callable[[Teacher], T]) -> T:
        """Runs a task, restarting crashed engines, until it completes or too many crash."""
        key, last = self._attempts.own_key(phase), None
        while True:
            teacher = self._running_teacher()
            self._raise_after_repeated_crashes(phase, last)
            result = self._attempt(key, functools.partial(task, teacher))
            if not isinstance(result, TeacherError):
                self._attempts.clear(key)
                return result
            self._drop(result)
            last = result

    def _raise_after_repeated_crashes(self, phase: str, last: TeacherError | None) -> None:
        """Fails a phase that involves no corpus rows if too many of its attempts crashed.

        Args:
            phase: key of ``_PHASES``.
            last: error of the previous attempt; None if this is the first attempt of the process.

        Raises:
            TeacherError: too many attempts have crashed.
        """
        num_crashes = self._attempts.count_crashes(self._attempts.own_key(phase)).total
        if num_crashes >= MAX_BLAMELESS_CRASHES:
            raise TeacherError(
                f"{num_crashes} engines crashed {_PHASES[phase]}: the teacher cannot run here; try "
                "fewer replicas, a smaller text.max_tokens or other teacher.engine options"
                f"{_last_crash(last)}"
            ) from last

    def _attempt(self, key: str, task: Callable[[], T], alone: bool = True) -> T | TeacherError:
        """Makes one attempt; returns its result or the crash error.

        The record is kept if the crash counts against the rows.
        """
        record = self._attempts.begin(key, alone)
        try:
            with self._watchdog.waiting():
                result = task()
        except TeacherGoneError:  # the remote server is down; no row is to blame
            self._attempts.end(record)
            raise
        except TeacherError as error:
            if self._was_killed(error):
                self._attempts.end(record)
            else:
                self._attempts.keep(record)
            return error
        self._attempts.end(record)
        self._num_killed = 0
        return result

    def _running_teacher(self) -> Teacher:
        """Returns the teacher, starting it if necessary.

        Raises:
            TeacherError: it cannot be loaded, or repeatedly crashes on start.
        """
        key = self._attempts.own_key(_START)
        last: TeacherError | None = None
        while self._teacher is None:
            self._raise_after_repeated_crashes(_START, last)
            record = self._attempts.begin(key)
            try:
                with self._watchdog.starting():
                    self._teacher = teacher = self._make_teacher()
                self._watchdog.wake = teacher.wake if isinstance(teacher, WakeableTeacher) else None
            except TeacherError as error:
                last = self._failed_start(record, error)
                self._say_crashed(last)
        self._attempts.clear(key)
        return self._teacher

    def _failed_start(self, record: str, error: TeacherError) -> TeacherError:
        """Returns the error if the start may be retried: the engine hung or was killed.

        Raises:
            TeacherError: any other failure: a load error already explains itself.
        """
        if self._watchdog.has_killed_engine:
            self._attempts.keep(record)
            return TeacherError(
                f"no result for {self._watchdog.stall_s:.0f}s; if it needs longer to start, raise "
                f"run.stall_s ({first_line(error)})"
            )
        self._attempts.end(record)
        if not self._was_killed(error):
            raise error
        return error

    def _was_killed(self, error: TeacherError) -> bool:
        """Whether the engine was killed from outside, so that its rows are not to blame.

        Raises:
            TeacherError: too many consecutive engines were killed from outside.
        """
        if not self._watchdog.was_killed_from_outside():
            return False
        self._num_killed += 1
        if self._num_killed >= MAX_KILLED:
            raise TeacherError(
                f"{self._num_killed} engines in a row were killed by a signal from outside; find "
                f"out what sends it, then run the same command again to resume{_last_crash(error)}"
            ) from error
        return True

    def _drop(self, error: TeacherError) -> None:
        """Discards a failed engine."""
        self._say_crashed(error)
        teacher, self._teacher = self._teacher, None
        if teacher is not None:
            with contextlib.suppress(Exception):  # a crashed engine need not close cleanly
                teacher.close()

    def _say_crashed(self, error: TeacherError) -> None:
        self._say(f"an engine crashed and is being restarted: {first_line(error)}")


def _last_crash(error: TeacherError | None) -> str:
    """The suffix of a crash message: the cause of the last crash."""
    if error is None:
        return "; the last engine crashed its worker process: see Ray's logs and `dmesg` for why"
    return f"; last error: {first_line(error)}"


def _rows_are_to_blame(crashes: CrashCounts, suspected: bool, is_single: bool) -> bool:
    """Whether these rows are to blame for the engine crashes.

    Args:
        crashes: crashes recorded for these rows.
        suspected: whether the rows are half of a batch that was to blame; one crash then suffices.
        is_single: whether this is a single row, which would be quarantined.
    """
    if is_single:
        return crashes.alone >= CRASHES_TO_BLAME
    return crashes.alone >= 1 and (suspected or crashes.total >= CRASHES_TO_BLAME)
