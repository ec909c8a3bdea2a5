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

import numpy as np

from labeler.attempts import Attempts, Deaths
from labeler.engine_users import EngineUsers
from labeler.engine_watch import EngineWatch
from labeler.requests import Request, key_of_unit
from labeler.teachers.base import RowFailure, Teacher
from labeler.unit_labels import UnitLabels, label_requests
from schemas.errors import TeacherError, TeacherGoneError
from schemas.keys import row_key, stack_keys
from schemas.spec import GenerationSpec

MAX_STARTS = 3
"""Engines that may die while they start or label the canary, before the run gives up."""

DEADLY = 2
"""Engines that have to die over the same rows before it is put down to the rows."""

MAX_OUTSIDE = 20
"""Engines that may be ended from outside while nothing comes back from any, likewise."""

_START = "start"
_CANARY = "canary"
_HARMLESS = {_START: "started", _CANARY: "labelled a row of two tokens"}
_CANARY_IDS = np.array([0, 1], np.int32)
_CANARY_SPANS = np.array([1, 2], np.int32)
_CANARY_KEY = stack_keys([row_key(_CANARY_IDS, _CANARY_SPANS)])


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
    ) -> None:
        """Prepares.

        Args:
            make_teacher: Starts an engine.
            attempts: Where it is recorded what engines are working on.
            generation, audit_rate: See ``label_requests``.
            watch: Ends engines that hang; None: nobody does.
        """
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
        key = key_of_unit(batch)
        if not self._attempts.deaths(key).total:
            found = self._labelled_together(batch, key)
            if found is not None:
                return found
        with self._users.alone():
            return self._labelled(batch, suspected=False), self._running().provenance()

    def running(self) -> Teacher:
        """The teacher, made if it is not there.

        Raises:
            TeacherError: No engine can be made.
        """
        with self._users.alone():
            return self._running()

    def _labelled_together(
        self, requests: list[Request], key: str
    ) -> tuple[UnitLabels, dict[str, object]] | None:
        """Labels requests beside those of other threads; None where they have to be tried alone."""
        while self._teacher is None:
            self.running()
        with self._users.together():
            teacher = self._teacher
            if teacher is None or not teacher.shareable:
                return None
            found = self._tried(requests, teacher, self._attempts.begin(key, alone=False))
            if found is not None:
                return found, teacher.provenance()
        with self._users.alone():  # all who shared it have failed as well
            if self._teacher is teacher:
                self._drop()
        return None

    def _tried(self, requests: list[Request], teacher: Teacher, record: str) -> UnitLabels | None:
        """One attempt; None where the engine died, which the record then tells if it counts."""
        try:
            with self._watch.waiting():
                found = label_requests(requests, teacher, self._generation, self._audit_rate)
        except TeacherGoneError:  # a server that somebody else runs: not the rows' doing
            self._attempts.end(record)
            raise
        except TeacherError:
            if self._was_ended_from_outside():
                self._attempts.end(record)
            else:
                self._attempts.failed(record)
            return None
        self._attempts.end(record)
        self._ended_outside = 0
        return found

    def _labelled(self, requests: list[Request], suspected: bool) -> UnitLabels:
        """Labels requests with nobody beside them.

        Args:
            requests: One or more.
            suspected: Whether they are part of what engines died over before.
        """
        key = key_of_unit(requests)
        alone = len(requests) == 1
        deaths = self._attempts.deaths(key)
        while not _is_deadly(deaths, suspected, alone):
            found = self._tried(requests, self._running(), self._attempts.begin(key))
            if found is not None:
                return found
            self._drop()
            deaths = self._attempts.deaths(key)
        self._check_canary()
        if alone:
            detail = f"{deaths.alone} engines died while they had this row alone"
            return UnitLabels([], [], [requests[0].quarantined("kills_engine", detail)])
        middle = len(requests) // 2
        halves = [self._labelled(half, True) for half in (requests[:middle], requests[middle:])]
        return halves[0].joined(halves[1])

    def _running(self) -> Teacher:
        if self._teacher is None:
            record = self._begin_harmless(_START)
            # What cannot be loaded at all raises here, and says why; a crash leaves the record.
            try:
                with self._watch.starting():
                    self._teacher = self._make_teacher()
                self._watch.wake = getattr(self._teacher, "wake", None)
            except TeacherError:
                self._attempts.end(record)
                if not self._was_ended_from_outside():
                    raise
                return self._running()
            self._attempts.clear(self._attempts.own_key(_START))
        return self._teacher

    def _was_ended_from_outside(self) -> bool:
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
            )
        return True

    def _begin_harmless(self, what: str) -> str:
        """Records an attempt that no row of the corpus can be blamed for."""
        key = self._attempts.own_key(what)
        deaths = self._attempts.deaths(key).total
        if deaths >= MAX_STARTS:
            raise TeacherError(
                f"{deaths} engines died while they {_HARMLESS[what]}: the teacher cannot run here; "
                "try fewer replicas, a smaller text.max_tokens or other teacher.engine options"
            )
        return self._attempts.begin(key)

    def _check_canary(self) -> None:
        """Labels a row of two tokens; raises a TeacherError if no engine can."""
        while True:  # until one passes, or too many died
            teacher = self._running()
            record = self._begin_harmless(_CANARY)
            try:
                with self._watch.waiting():
                    (result,) = teacher.label([_CANARY_IDS], [_CANARY_SPANS], _CANARY_KEY)
            except TeacherError:
                if self._was_ended_from_outside():
                    self._attempts.end(record)
                else:
                    self._attempts.failed(record)
                self._drop()
                continue
            self._attempts.clear(self._attempts.own_key(_CANARY))
            if isinstance(result, RowFailure):
                raise TeacherError(
                    f"the teacher cannot label a row of two tokens: {result.reason} "
                    f"({result.detail})"
                )
            return

    def _drop(self) -> None:
        """Ends an engine that failed, as far as it still can be."""
        teacher, self._teacher = self._teacher, None
        if teacher is not None:
            with contextlib.suppress(Exception):  # it is broken already
                teacher.close()


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
