"""Rows that kill engines: found by halving, quarantined alone, their neighbours labelled."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labeler.corpus.requests import label_request, requests_unit_key
from labeler.corpus.windows import all_but_first
from labeler.supervision.attempts import Attempts, CrashCounts, remove_attempts
from labeler.supervision.supervisor import MAX_BLAMELESS_CRASHES, EngineSupervisor
from labeler.teachers.protocol import RowLabels, Teacher
from schemas.errors import RowFailure, TeacherError, TeacherGoneError
from schemas.storage.store import Store
from tests.support import ROOT
from tests.support.fragile_teacher import POISON, REFUSED, FragileTeacher, requests, supervisor


def test_supervisor_quarantines_the_killing_row_alone(tmp_path: Path) -> None:
    tokens = [*range(20, 51), POISON, REFUSED]
    found, _ = supervisor(tmp_path).label(requests(tokens))
    assert [request.place for request in found.requests] == list(range(31))
    assert found.labels is not None
    assert len(found.labels) == 31
    reasons = {row.place: row.reason for row in found.quarantined}
    assert reasons == {31: "kills_engine", 32: "refused"}
    assert FragileTeacher.started <= 4 + np.ceil(np.log2(len(tokens))) + 1


def test_supervisor_finds_every_killing_row_of_a_unit(tmp_path: Path) -> None:
    tokens = [20, POISON, 21, 22, POISON, 23]
    batch = requests(tokens)
    batch[4] = label_request(np.array([POISON, 1], np.int32), all_but_first(2), "a", 4, 0)
    found, _ = supervisor(tmp_path).label(batch)
    assert [row.place for row in found.quarantined] == [1, 4]
    assert [request.place for request in found.requests] == [0, 2, 3, 5]


def test_supervisor_ends_the_run_over_a_broken_engine(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="3 engines crashed on a row of two tokens"):
        supervisor(tmp_path, canary_dies=True).label(requests([20, POISON]))


def test_supervisor_reports_why_the_last_engine_crashed(tmp_path: Path) -> None:
    lines: list[str] = []
    broken = EngineSupervisor(
        lambda: FragileTeacher(canary_dies=True),
        Attempts(Store(str(tmp_path)), "run"),
        None,
        say=lines.append,
    )
    with pytest.raises(TeacherError, match=r"options; last error: the engine died$") as caught:
        broken.label(requests([20, POISON]))
    assert isinstance(caught.value.__cause__, TeacherError)
    assert lines == ["an engine crashed and is being restarted: the engine died"] * (2 + 3)


def test_engines_that_crashed_their_process_leave_no_error(tmp_path: Path) -> None:
    attempts = Attempts(Store(str(tmp_path)), "run")
    for _ in range(MAX_BLAMELESS_CRASHES):
        attempts.keep(attempts.begin(attempts.own_key("start")))
    with pytest.raises(TeacherError, match="the last engine crashed its worker process"):
        EngineSupervisor(FragileTeacher, attempts, None).label(requests([20]))


def test_quarantine_keeps_what_the_engine_said(tmp_path: Path) -> None:
    class Talkative(FragileTeacher):
        def label(self, *arguments: Any, **more: Any) -> list[RowLabels | RowFailure]:
            try:
                return super().label(*arguments, **more)
            except TeacherError as error:
                raise TeacherError("CUDA error: illegal access\nlong\ntraceback") from error

    lines: list[str] = []
    attempts = Attempts(Store(str(tmp_path)), "run")
    found, _ = EngineSupervisor(Talkative, attempts, None, say=lines.append).label(
        requests([POISON])
    )
    (row,) = found.quarantined
    assert row.detail == (
        "2 engines crashed on this row alone; last error: CUDA error: illegal access"
    )
    assert lines == ["an engine crashed and is being restarted: CUDA error: illegal access"] * 2


def test_supervisor_repeats_a_parity_check_that_crashed(tmp_path: Path) -> None:
    FragileTeacher.started = 0

    def check(teacher: Teacher) -> int:
        if FragileTeacher.started <= deaths:
            raise TeacherError("the engine died")
        return FragileTeacher.started

    deaths = MAX_BLAMELESS_CRASHES - 1
    assert supervisor(tmp_path).run_exclusively(check) == MAX_BLAMELESS_CRASHES
    deaths = 100
    with pytest.raises(
        TeacherError, match=r"3 engines crashed during the parity check.* last error"
    ):
        supervisor(tmp_path, run="other").run_exclusively(check)


def test_supervisor_reports_at_once_why_no_teacher_can_be_made(tmp_path: Path) -> None:
    calls = []

    def refuse() -> FragileTeacher:
        calls.append(1)
        raise TeacherError("no such model")

    teacher = EngineSupervisor(refuse, Attempts(Store(str(tmp_path)), "run"), None)
    for _ in range(5):
        with pytest.raises(TeacherError, match="no such model"):
            teacher.label(requests([20]))
    assert len(calls) == 5


def test_supervisor_starts_no_engine_before_the_first_rows(tmp_path: Path) -> None:
    supervisor(tmp_path)
    assert FragileTeacher.started == 0


def test_only_this_run_and_living_nodes_count(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    first = Attempts(store, "first", node="a")
    for _ in range(2):
        first.keep(first.begin("key"))
    assert Attempts(store, "first", node="b").count_crashes("key") == CrashCounts(alone=2)
    assert (
        Attempts(store, "first", is_lost=lambda node: node == "a").count_crashes("key")
        == CrashCounts()
    )
    assert Attempts(store, "second").count_crashes("key") == CrashCounts()
    came_back = first.begin("other")
    first.end(came_back)
    assert first.count_crashes("other") == CrashCounts()
    remove_attempts(store, "first")
    assert first.count_crashes("key") == CrashCounts()
    remove_attempts(store, "first")  # of a run that left nothing


def test_starts_of_other_replicas_are_no_deaths(tmp_path: Path) -> None:
    """They are still in flight, and their records are in the folder of the same run."""
    store = Store(str(tmp_path))
    for replica in range(MAX_BLAMELESS_CRASHES + 1):
        others = Attempts(store, "run", actor=f"replica-{replica}")
        others.begin(others.own_key("start"))
    last = Attempts(store, "run", actor="last")
    found, _ = EngineSupervisor(FragileTeacher, last, None).label(requests([20]))
    assert len(found.requests) == 1


def test_starts_before_a_restart_of_the_actor_are_deaths(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for _ in range(MAX_BLAMELESS_CRASHES):
        before = Attempts(store, "run", actor="replica")
        before.keep(before.begin(before.own_key("start")))
    again = Attempts(store, "run", actor="replica")
    with pytest.raises(TeacherError, match="3 engines crashed while starting"):
        EngineSupervisor(FragileTeacher, again, None).label(requests([20]))


def test_attempt_that_ends_while_counted_is_no_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    attempts = Attempts(store, "run")
    attempts.keep(attempts.begin("key"))
    ending = attempts.begin("key")
    listed = store.list("attempts/run/key", ".json")
    attempts.end(ending)
    monkeypatch.setattr(store, "list", lambda *_: listed)
    assert attempts.count_crashes("key") == CrashCounts(alone=1)


def test_clearing_a_key_beside_another_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is looked at, the other begins, and then what was seen is removed."""
    store = Store(str(tmp_path))
    attempts, other = Attempts(store, "run"), Attempts(store, "run")
    attempts.begin("key")
    unlink = os.unlink

    def unlink_late(path: str, **where: Any) -> None:
        monkeypatch.undo()
        other.begin("key")
        unlink(path, **where)

    monkeypatch.setattr(os, "unlink", unlink_late)
    attempts.clear("key")
    assert attempts.count_crashes("key") == CrashCounts(alone=1)


CHILD = """
import json, sys
from pathlib import Path
from tests.support.fragile_teacher import requests, supervisor
found, _ = supervisor(Path({folder!r}), crash=True).label(requests({tokens!r}))
print(json.dumps([[r.place for r in found.requests], [r.place for r in found.quarantined]]))
"""


def test_supervisor_outlives_its_process(tmp_path: Path) -> None:
    """The process is the engine: whoever restarts it, as Ray does, gets on in the end."""
    child = CHILD.format(folder=str(tmp_path), tokens=[20, 21, POISON, 22])
    deaths = 0
    while deaths < 12:
        done = subprocess.run(
            [sys.executable, "-c", child], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode == 0:
            break
        assert done.returncode == 11, done.stderr
        deaths += 1
    assert json.loads(done.stdout) == [[0, 1, 3], [2]]
    assert deaths == 5  # the four rows twice, a half once, the row alone twice


@pytest.mark.parametrize("shared", [True, False])
def test_supervisor_holds_a_lost_server_against_no_row(tmp_path: Path, shared: bool) -> None:
    class Gone(FragileTeacher):
        shareable = shared

        def label(self, *_: object) -> list[RowLabels | RowFailure]:
            raise TeacherGoneError("no answer")

    attempts = Attempts(Store(str(tmp_path)), "run")
    for _ in range(3):
        with pytest.raises(TeacherGoneError, match="no answer"):
            EngineSupervisor(Gone, attempts, None).label(requests([20, 21]))
    assert attempts.count_crashes(requests_unit_key(requests([20, 21]))) == CrashCounts()
