"""Engines that hang are ended; those that somebody else ended are not held against their rows."""

import functools
import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import labeler.supervision.supervisor
from labeler.supervision.attempts import Attempts
from labeler.supervision.supervisor import EngineSupervisor
from labeler.supervision.watchdog import EXIT_STALLED, Watchdog
from labeler.teachers.protocol import OnRow, RowLabels, ignore_row
from schemas.errors import RowFailure, TeacherError
from schemas.storage.store import Store
from tests.support.engine_process import CRASH, FAIL, KILL, KILL_ALWAYS, STOP, engine
from tests.support.fragile_teacher import FragileTeacher, requests


class ProcessTeacher(FragileTeacher):
    """Its engine is a process of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        context = multiprocessing.get_context("spawn")
        self._pipe, its = context.Pipe()
        self._process = context.Process(target=engine, args=(its, folder), daemon=True)
        self._process.start()
        its.close()

    def label(
        self,
        token_ids: Sequence[np.ndarray],
        label_spans: Sequence[np.ndarray],
        row_keys: np.ndarray,
        audit_rate: float = 0.0,
        on_row: OnRow = ignore_row,
    ) -> list[RowLabels | RowFailure]:
        try:
            self._pipe.send([int(ids[0]) for ids in token_ids])
            self._pipe.recv()
        except (EOFError, OSError) as error:
            raise TeacherError("the engine died") from error
        return super().label(token_ids, label_spans, row_keys, audit_rate, on_row)

    def close(self) -> None:
        self._process.terminate()


def supervisor(folder: Path, stall_s: float = 60.0) -> EngineSupervisor:
    ProcessTeacher.started = 0
    attempts = Attempts(Store(str(folder / "attempts")), "run")
    return EngineSupervisor(
        lambda: ProcessTeacher(folder), attempts, None, watchdog=Watchdog(stall_s)
    )


def test_watchdog_ends_a_hanging_engine(tmp_path: Path) -> None:
    found, _ = supervisor(tmp_path, stall_s=4.0).label(requests([STOP]))
    assert [row.reason for row in found.quarantined] == ["kills_engine"]


def test_signal_from_outside_is_held_against_no_row(tmp_path: Path) -> None:
    found, _ = supervisor(tmp_path).label(requests([KILL]))
    assert len(found.requests) == 1
    assert ProcessTeacher.started == 2
    assert not any(path.is_file() for path in (tmp_path / "attempts").rglob("*"))


@pytest.mark.parametrize("how", [CRASH, FAIL])
def test_crash_is_held_against_the_row(tmp_path: Path, how: int) -> None:
    found, _ = supervisor(tmp_path).label(requests([how]))
    assert [row.reason for row in found.quarantined] == ["kills_engine"]


class StuckStarter(ProcessTeacher):
    """Its engine stops while it starts: the first of all, or each."""

    def __init__(self, folder: Path, always: bool) -> None:
        super().__init__(folder)
        if always or StuckStarter.started == 1:
            try:
                self._pipe.send([STOP])
                self._pipe.recv()
            except (EOFError, OSError) as error:
                raise TeacherError("the engine does not start") from error


def stuck_starters(folder: Path, always: bool, stall_s: float) -> EngineSupervisor:
    StuckStarter.started = 0
    attempts = Attempts(Store(str(folder / "attempts")), "run")
    make = functools.partial(StuckStarter, folder, always)
    return EngineSupervisor(make, attempts, None, watchdog=Watchdog(stall_s))


def test_watchdog_restarts_an_engine_that_hangs_while_starting(tmp_path: Path) -> None:
    found, _ = stuck_starters(tmp_path, always=False, stall_s=4.0).label(requests([20]))
    assert len(found.requests) == 1
    assert StuckStarter.started == 2
    assert not any(path.is_file() for path in (tmp_path / "attempts").rglob("*"))


def test_supervisor_ends_the_run_when_all_engines_hang_while_starting(tmp_path: Path) -> None:
    expected = "3 engines crashed while starting: .*; last error: .* raise run.stall_s"
    with pytest.raises(TeacherError, match=expected):
        stuck_starters(tmp_path, always=True, stall_s=1.5).label(requests([20]))
    assert StuckStarter.started == 3


class DeafTeacher(ProcessTeacher):
    """Does not notice that its engine is gone until somebody says so, as vLLM does not."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._told = threading.Event()

    def wake(self) -> None:
        self._told.set()

    def label(
        self,
        token_ids: Sequence[np.ndarray],
        label_spans: Sequence[np.ndarray],
        row_keys: np.ndarray,
        audit_rate: float = 0.0,
        on_row: OnRow = ignore_row,
    ) -> list[RowLabels | RowFailure]:
        try:
            return super().label(token_ids, label_spans, row_keys, audit_rate, on_row)
        except TeacherError:
            assert self._told.wait(30)
            raise


def test_watchdog_wakes_a_call_that_misses_a_crash(tmp_path: Path) -> None:
    attempts = Attempts(Store(str(tmp_path / "attempts")), "run")
    watch = Watchdog(60.0)
    deaf = EngineSupervisor(lambda: DeafTeacher(tmp_path), attempts, None, watchdog=watch)
    found, _ = deaf.label(requests([KILL]))
    assert len(found.requests) == 1


def test_supervisor_ends_the_run_when_engines_are_always_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labeler.supervision.supervisor, "MAX_KILLED", 2)  # 20 take a while
    watched = supervisor(tmp_path)
    expected = "2 engines in a row were killed by a signal .*; last error: the engine died"
    with pytest.raises(TeacherError, match=expected):
        watched.label(requests([KILL_ALWAYS]))
    assert ProcessTeacher.started == 2


@pytest.mark.parametrize(
    ("hang", "code"),
    [
        ("import time; time.sleep(60)", EXIT_STALLED),
        # Holds the interpreter's lock, so that no thread of Python ever runs again.
        ("import ctypes; ctypes.PyDLL(None).sleep(60)", 1),
    ],
)
def test_watchdog_ends_its_own_process_over_an_engine_in_it(hang: str, code: int) -> None:
    child = (
        "from labeler.supervision.watchdog import Watchdog\n"
        f"with Watchdog(1.0).waiting():\n    {hang}"
    )
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, timeout=50)
    assert done.returncode == code, done.stderr
