"""A teacher that outlives rows which kill its engine.

Such a row must not end the job, nor be tried for ever, nor take others with it. Units that nothing
is known against share an engine, where it can be shared, so that it never waits for the next one.
If it dies, any of the units in flight may have done it: each is tried again with a fresh engine to
itself, and only what dies then is held against its rows.

Rows over which an engine died twice, once of it with no others in flight, are halved, and the
halves are tried on a fresh engine, until the row that does it is alone. It is quarantined when it
alone has killed two fresh engines while a canary row passes on another. If the canary does not pass
either, it is the engine that is broken, and the job ends.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from labeler.corpus.requests import Request, requests_unit_key
from labeler.supervision.attempts import Attempts, Deaths
from labeler.supervision.shared_lock import EngineUsers
from labeler.supervision.watchdog import EngineWatch
from labeler.teachers.protocol import Teacher
from labeler.units.unit_labels import UnitLabels, label_requests
from schemas.errors import RowFailure, TeacherError, TeacherGoneError, first_line
from schemas.keys import row_key, stack_keys
from schemas.spec import GenerationSpec

T = TypeVar("T")

MAX_STARTS = 3
"""Engines that may die over what no row can be blamed for, before the run gives up."""

DEADLY = 2
"""Engines that have to die over the same rows before it is put down to the rows."""

MAX_OUTSIDE = 20
"""Engines that may be ended from outside while nothing comes back from any, likewise."""

_START = "start"
_CANARY = "canary"
_QUESTION = "question"
_HARMLESS = {
    _START: "started",
    _CANARY: "labelled a row of two tokens",
    _QUESTION: "scored labels that others like them had made",
}
_CANARY_IDS = np.array([0, 1], np.int32)
_CANARY_SPANS = np.array([1, 2], np.int32)
_CANARY_KEY = stack_keys([row_key(_CANARY_IDS, _CANARY_SPANS)])


def _nobody(_: str) -> None:
    pass


class Survivor:
    """Labels requests, with as many engines as it takes.

    The engine is made when the first requests come, so that a run that has nothing to do starts
    none. Calls may come from several threads; they share the engine where its ``shareable`` says
    so, until one of them is suspected of killing engines.
    """

    def __init__(
        self,
        make_teacher: Callable[[], Teacher],
        attempts: Attempts,
        generation: GenerationSpec | None,
        audit_rate: float = 0.0,
        watch: EngineWatch | None = None,
        tell: Callable[[str], None] = _nobody,
    ) -> None:
        """Prepares.

        Args:
            make_teacher: Starts an engine.
            attempts: Where it is recorded what engines are working on.
            generation, audit_rate: See ``label_requests``.
            watch: Ends engines that hang; None: nobody does.
            tell: Gets a line for the people who watch, whenever an engine has died.
        """
        self._tell = tell
        self._audit_rate = audit_rate
        self._watch = watch or EngineWatch(math.inf)
        self._ended_outside = 0
        self._make_teacher = make_teacher
        self._attempts = attempts
        self._generation = generation
        self._teacher: Teacher | None = None
        self._users = EngineUsers()  # engines are made and dropped by who is alone

    def label(self, requests: Sequence[Request]) -> tuple[UnitLabels, dict[str, object]]:
        """What became of each request, and the provenance of the labels.

        Raises:
            TeacherError: No engine can be made, or engines die whatever they label.
        """
        batch = list(requests)
        key = requests_unit_key(batch)
        if not self._attempts.deaths(key).total:
            found = self._labelled_together(batch, key)
            if found is not None:
                return found
        with self._users.alone():
            return self._labelled(batch, suspected=False), self._running().provenance()

    def ask(self, question: Callable[[Teacher], T]) -> T:
        """What the teacher says to something else than rows to be labelled; nobody is beside it.

        Raises:
            TeacherError: No engine can be made, or engines die over it.
        """
        with self._users.alone():
            return self._answered(_QUESTION, question)

    def _labelled_together(
        self, requests: list[Request], key: str
    ) -> tuple[UnitLabels, dict[str, object]] | None:
        """Labels requests beside those of other threads; None where they have to be tried alone."""
        while self._teacher is None:
            with self._users.alone():
                self._running()
        with self._users.together():
            teacher = self._teacher
            if teacher is None or not teacher.shareable:
                return None
            found = self._tried(requests, teacher, self._attempts.begin(key, alone=False))
            if isinstance(found, UnitLabels):
                return found, teacher.provenance()
        with self._users.alone():  # all who shared it have failed as well
            if self._teacher is teacher:
                self._drop(found)
        return None

    def _tried(
        self, requests: list[Request], teacher: Teacher, record: str
    ) -> UnitLabels | TeacherError:
        """One attempt: labels, or what the engine died of; the record then tells if it counts."""
        try:
            with self._watch.waiting():
                found = label_requests(requests, teacher, self._generation, self._audit_rate)
        except TeacherGoneError:  # a server that somebody else runs: not the rows' doing
            self._attempts.end(record)
            raise
        except TeacherError as error:
            self._note_death(record, error)
            return error
        self._attempts.end(record)
        self._ended_outside = 0
        return found

    def _labelled(self, requests: list[Request], suspected: bool) -> UnitLabels:
        """Labels requests with nobody beside them.

        Args:
            requests: One or more.
            suspected: Whether they are part of what engines died over before.
        """
        key = requests_unit_key(requests)
        alone = len(requests) == 1
        deaths, last = self._attempts.deaths(key), None
        while not _is_deadly(deaths, suspected, alone):
            found = self._tried(requests, self._running(), self._attempts.begin(key))
            if isinstance(found, UnitLabels):
                return found
            self._drop(found)
            deaths, last = self._attempts.deaths(key), found
        self._check_canary()
        if alone:
            detail = f"{deaths.alone} engines died while they had this row alone{_of(last)}"
            return UnitLabels([], [], [requests[0].quarantined("kills_engine", detail)])
        middle = len(requests) // 2
        halves = [self._labelled(half, True) for half in (requests[:middle], requests[middle:])]
        return halves[0].joined(halves[1])

    def _running(self) -> Teacher:
        last: TeacherError | None = None
        while self._teacher is None:
            record = self._begin_harmless(_START, last)
            try:
                with self._watch.starting():
                    self._teacher = self._make_teacher()
                self._watch.wake = getattr(self._teacher, "wake", None)
            except TeacherError as error:
                last = self._after_no_start(record, error)
        self._attempts.clear(self._attempts.own_key(_START))
        return self._teacher

    def _after_no_start(self, record: str, error: TeacherError) -> TeacherError:
        """What an engine did not start for, where another may be tried.

        One that hung counts as having died, as one does that takes its process along.

        Raises:
            TeacherError: No other can be: what cannot be loaded at all says why.
        """
        if self._watch.has_ended_it():
            self._attempts.failed(record)
            error = TeacherError(
                f"it gave nothing back for {self._watch.stall_s:.0f}s; if it needs longer to "
                f"start, raise run.stall_s ({first_line(error)})"
            )
        else:
            self._attempts.end(record)
            if not self._was_ended_from_outside(error):
                raise error
        self._tell_of(error)
        return error

    def _note_death(self, record: str, error: TeacherError) -> None:
        """Leaves the record of an attempt over which the engine died, if that counts."""
        if self._was_ended_from_outside(error):
            self._attempts.end(record)
        else:
            self._attempts.failed(record)

    def _was_ended_from_outside(self, error: TeacherError) -> bool:
        """Whether the engine that has just died did so for no fault of what it had.

        Raises:
            TeacherError: That has happened too often.
        """
        if not self._watch.was_ended_from_outside():
            return False
        self._ended_outside += 1
        if self._ended_outside >= MAX_OUTSIDE:
            raise TeacherError(
                f"{self._ended_outside} engines in a row were ended by a signal from outside; "
                "find out who sends it, and run the same command again to go on from here"
                f"{_of(error)}"
            ) from error
        return True

    def _begin_harmless(self, what: str, last: TeacherError | None = None) -> str:
        """Records an attempt that no row of the corpus can be blamed for.

        Args:
            what: It is that is tried.
            last: What the engine died of that tried it before; None where its process died too.

        Raises:
            TeacherError: Too many died.
        """
        key = self._attempts.own_key(what)
        deaths = self._attempts.deaths(key).total
        if deaths >= MAX_STARTS:
            raise TeacherError(
                f"{deaths} engines died while they {_HARMLESS[what]}: the teacher cannot run here; "
                "try fewer replicas, a smaller text.max_tokens or other teacher.engine options"
                f"{_of(last)}"
            ) from last
        return self._attempts.begin(key)

    def _check_canary(self) -> None:
        """Labels a row of two tokens; raises a TeacherError if no engine can."""
        (result,) = self._answered(
            _CANARY, lambda teacher: teacher.label([_CANARY_IDS], [_CANARY_SPANS], _CANARY_KEY)
        )
        if isinstance(result, RowFailure):
            raise TeacherError(
                f"the teacher cannot label a row of two tokens: {result.reason} ({result.detail})"
            )

    def _answered(self, what: str, question: Callable[[Teacher], T]) -> T:
        """Asks one engine after another something harmless, until one answers or too many died."""
        last: TeacherError | None = None
        while True:
            teacher = self._running()
            record = self._begin_harmless(what, last)
            try:
                with self._watch.waiting():
                    answer = question(teacher)
            except TeacherError as error:
                self._note_death(record, error)
                self._drop(error)
                last = error
                continue
            self._attempts.clear(self._attempts.own_key(what))
            return answer

    def _tell_of(self, error: TeacherError) -> None:
        self._tell(f"an engine died and is started anew: {first_line(error)}")

    def _drop(self, error: TeacherError) -> None:
        """Ends an engine that failed, as far as it still can be, and tells of what."""
        self._tell_of(error)
        teacher, self._teacher = self._teacher, None
        if teacher is not None:
            with contextlib.suppress(Exception):  # it is broken already
                teacher.close()


def _of(last: TeacherError | None) -> str:
    """How a message ends that tells of engines that died: with what the last one died of."""
    if last is None:
        return "; the last one took its process along: Ray's logs and `dmesg` may say why"
    return f"; the last one: {first_line(last)}"


def _is_deadly(deaths: Deaths, suspected: bool, single: bool) -> bool:
    """Whether it is down to these rows that engines died.

    Args:
        deaths: Of engines that had these rows.
        suspected: Whether the rows are half of such, so that one more death tells enough.
        single: Whether it is one row, which would be quarantined.
    """
    if single:
        return deaths.alone >= DEADLY
    return deaths.alone >= 1 and (suspected or deaths.total >= DEADLY)
