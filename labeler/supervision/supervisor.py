"""Labels requests with as many engines as it takes, and isolates the rows that crash them.

A row that crashes its engine must neither end the job, nor be retried for ever, nor take other rows
with it:

1. Units without a recorded crash share an engine where it can be shared, so that it never idles. If
   it crashes, any unit in flight may be the cause: each is retried on a new engine of its own, and
   only a crash there counts against its rows.
2. Rows over which two engines crashed, one of them exclusively theirs, are halved, and the halves
   retried on a new engine, until the row that causes it is alone.
3. A single row is quarantined once it has crashed two new engines on its own while a canary row
   passes on another. If the canary fails too, the engine itself is broken, and the job ends.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from labeler.corpus.requests import Request, requests_unit_key
from labeler.supervision.attempts import Attempts, Crashes
from labeler.supervision.shared_lock import SharedLock
from labeler.supervision.watchdog import Watchdog
from labeler.teachers.canary import label_canary
from labeler.teachers.protocol import Teacher
from labeler.units.unit_labels import UnitLabels, label_requests
from labeler.units.unit_progress import UnitProgress
from schemas.errors import RowFailure, TeacherError, TeacherGoneError, first_line
from schemas.spec import GenerationSpec

T = TypeVar("T")

MAX_BLAMELESS_CRASHES = 3
"""Crashes in one phase that no row can be blamed for, after which the run gives up."""

MAX_KILLED = 20
"""Engines killed from outside in a row, after which the run gives up."""

CRASHES_TO_BLAME = 2
"""Engines that have to crash over the same rows before the rows are blamed."""

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

    The first engine is started by the first requests, so that a run with nothing to do starts none.
    Calls may come from several threads; they share the engine where its ``shareable`` says so.
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
            attempts: record of what engines are working on.
            generation, audit_rate: see ``label_requests``.
            watchdog: ends engines that hang; None: they may hang for ever.
            say: called with one line whenever an engine has crashed.
        """
        self._make_teacher = make_teacher
        self._attempts = attempts
        self._generation = generation
        self._audit_rate = audit_rate
        self._watchdog = watchdog or Watchdog(math.inf)
        self._say = say
        self._num_killed = 0
        self._teacher: Teacher | None = None
        self._lock = SharedLock()  # held exclusively to start and to drop engines

    def label(
        self, requests: Sequence[Request], progress: UnitProgress | None = None
    ) -> tuple[UnitLabels, dict[str, object]]:
        """Labels or quarantines each request; also returns the provenance of the labels.

        Raises:
            TeacherError: no engine starts, or engines crash whatever they label.
        """
        batch = list(requests)
        if not self._attempts.crashes(requests_unit_key(batch)).total:
            found = self._label_shared(batch, progress)
            if found is not None:
                return found
        with self._lock.exclusive():
            labels = self._label_exclusively(batch, progress, suspected=False)
            return labels, self._running_teacher().provenance()

    def run_exclusively(self, task: Callable[[Teacher], T]) -> T:
        """Runs the parity check, or a part of it, while the teacher does nothing else.

        Raises:
            TeacherError: no engine starts, or engines crash over it.
        """
        with self._lock.exclusive():
            return self._run_blameless(_PARITY, task)

    def _label_shared(
        self, requests: list[Request], progress: UnitProgress | None
    ) -> tuple[UnitLabels, dict[str, object]] | None:
        """Labels requests beside those of other threads; None: retry them exclusively."""
        # In a loop: between the two locks another thread may have dropped the engine again.
        while self._teacher is None:
            with self._lock.exclusive():
                self._running_teacher()
        with self._lock.shared():
            teacher = self._teacher
            if teacher is None or not teacher.shareable:
                return None
            found = self._label_once(requests, teacher, progress, alone=False)
            if isinstance(found, UnitLabels):
                return found, teacher.provenance()
        # By now every call that shared the engine has failed; the first one drops it.
        with self._lock.exclusive():
            if self._teacher is teacher:
                self._drop(found)
        return None

    def _label_exclusively(
        self, requests: list[Request], progress: UnitProgress | None, suspected: bool
    ) -> UnitLabels:
        """Labels requests on an engine of their own, halving them while they crash it.

        Args:
            requests: one or more.
            progress: of the unit that they are from.
            suspected: they are half of rows that crashed engines.
        """
        key = requests_unit_key(requests)
        is_single = len(requests) == 1
        crashes, last = self._attempts.crashes(key), None
        while not _are_to_blame(crashes, suspected, is_single):
            found = self._label_once(requests, self._running_teacher(), progress)
            if isinstance(found, UnitLabels):
                return found
            self._drop(found)
            crashes, last = self._attempts.crashes(key), found
        # Before rows are blamed: an engine that fails on any row would quarantine the corpus.
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
        """One attempt at requests, or the error of the crash."""
        return self._attempt(
            requests_unit_key(requests),
            lambda: label_requests(requests, teacher, self._generation, self._audit_rate, progress),
            alone,
        )

    def _check_canary(self) -> None:
        """Labels a row of two tokens.

        Raises:
            TeacherError: no engine can.
        """
        result = self._run_blameless(_CANARY, label_canary)
        if isinstance(result, RowFailure):
            raise TeacherError(
                f"the teacher cannot label a row of two tokens: {result.reason} ({result.detail})"
            )

    def _run_blameless(self, phase: str, task: Callable[[Teacher], T]) -> T:
        """Runs a task on one engine after another until one completes it or too many crash."""
        key, last = self._attempts.own_key(phase), None
        while True:
            teacher = self._running_teacher()
            self._check_crashes(phase, last)
            result = self._attempt(key, functools.partial(task, teacher))
            if not isinstance(result, TeacherError):
                self._attempts.clear(key)
                return result
            self._drop(result)
            last = result

    def _check_crashes(self, phase: str, last: TeacherError | None) -> None:
        """Gives up on a phase that involves no row of the corpus.

        Args:
            phase: key of ``_PHASES``.
            last: why the previous attempt failed; None: there was none, or its process crashed too.

        Raises:
            TeacherError: too many attempts have failed.
        """
        num_crashes = self._attempts.crashes(self._attempts.own_key(phase)).total
        if num_crashes >= MAX_BLAMELESS_CRASHES:
            raise TeacherError(
                f"{num_crashes} engines crashed {_PHASES[phase]}: the teacher cannot run here; try "
                "fewer replicas, a smaller text.max_tokens or other teacher.engine options"
                f"{_last_crash(last)}"
            ) from last

    def _attempt(self, key: str, task: Callable[[], T], alone: bool = True) -> T | TeacherError:
        """One attempt: its result, or the error of the crash, whose record stays if it counts."""
        record = self._attempts.begin(key, alone)
        try:
            with self._watchdog.waiting():
                result = task()
        except TeacherGoneError:  # a remote server is down, which no row has caused
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
        """The teacher, started if necessary.

        Raises:
            TeacherError: it cannot be loaded, or crashes whenever it starts.
        """
        key = self._attempts.own_key(_START)
        last: TeacherError | None = None
        while self._teacher is None:
            self._check_crashes(_START, last)
            record = self._attempts.begin(key)
            try:
                with self._watchdog.starting():
                    self._teacher = self._make_teacher()
                self._watchdog.wake = getattr(self._teacher, "wake", None)
            except TeacherError as error:
                last = self._failed_start(record, error)
                self._say_crashed(last)
        self._attempts.clear(key)
        return self._teacher

    def _failed_start(self, record: str, error: TeacherError) -> TeacherError:
        """The error of a start that may be retried: the engine hung or was killed from outside.

        Raises:
            TeacherError: any other, because a teacher that cannot be loaded says why.
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
            TeacherError: too many in a row were.
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
    """The end of a message about crashes: why the last engine crashed."""
    if error is None:
        return "; the last engine crashed its worker process: see Ray's logs and `dmesg` for why"
    return f"; last error: {first_line(error)}"


def _are_to_blame(crashes: Crashes, suspected: bool, is_single: bool) -> bool:
    """Whether rows caused the crashes of engines that had them.

    Args:
        crashes: recorded for these rows.
        suspected: the rows are half of such rows, so that one more crash is enough.
        is_single: one row, which would be quarantined.
    """
    if is_single:
        return crashes.alone >= CRASHES_TO_BLAME
    return crashes.alone >= 1 and (suspected or crashes.total >= CRASHES_TO_BLAME)
