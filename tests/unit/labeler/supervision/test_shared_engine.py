"""Several units in one engine: nobody waits while all is well, nobody is blamed for a neighbour."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from labeler.corpus.requests import requests_unit_key
from labeler.supervision.attempts import Attempts, CrashCounts
from labeler.supervision.shared_lock import SharedLock
from labeler.supervision.supervisor import EngineSupervisor
from schemas.storage.store import Store
from tests.support import ROOT
from tests.support.fragile_teacher import POISON, SharedTeacher, label_all, units

SEED = int(os.environ.get("TUTELAGE_SEED", "7"))


def test_units_share_an_engine(tmp_path: Path) -> None:
    teacher = SharedTeacher(expected=3)
    supervisor = EngineSupervisor(lambda: teacher, Attempts(Store(str(tmp_path)), "run"), None)
    found = label_all(supervisor, units([[1, 2], [3, 4], [5, 6]]))
    assert [len(unit.requests) for unit in found] == [2, 2, 2]
    assert teacher.most_together == 3
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_neighbours_of_a_row_that_kills_are_labelled(tmp_path: Path) -> None:
    teachers: list[SharedTeacher] = []

    def make() -> SharedTeacher:
        teachers.append(SharedTeacher(expected=1 if teachers else 4))
        return teachers[-1]

    attempts = Attempts(Store(str(tmp_path)), "run")
    batches = units([[1, 2, 3, 4], [5, POISON, 6, 7], [8, 9], [10]])
    lines: list[str] = []
    found = label_all(EngineSupervisor(make, attempts, None, say=lines.append), batches)
    assert [len(unit.requests) for unit in found] == [4, 3, 2, 1]
    quarantined = [(row.place, row.reason) for unit in found for row in unit.quarantined]
    assert quarantined == [(5, "kills_engine")]
    assert teachers[0].most_together == 4
    assert all(teacher.most_together == 1 for teacher in teachers[1:])
    assert len(lines) == len(teachers) - 1  # once an engine, however many units were in it
    # Who only was there when it happened has nothing else against it.
    for innocent in (0, 2, 3):
        assert attempts.count_crashes(requests_unit_key(batches[innocent])) == CrashCounts(shared=1)


def test_deaths_beside_others_quarantine_nobody(tmp_path: Path) -> None:
    """However often: only what died alone is held against rows."""
    attempts = Attempts(Store(str(tmp_path)), "run")
    (batch,) = units([[20]])
    for _ in range(9):
        attempts.keep(attempts.begin(requests_unit_key(batch), alone=False))
    found, _ = EngineSupervisor(SharedTeacher, attempts, None).label(batch)
    assert len(found.requests) == 1


CHILD = """
import json, sys
from labeler.supervision.attempts import Attempts
from labeler.supervision.supervisor import EngineSupervisor
from schemas.storage.store import Store
from tests.support.fragile_teacher import SharedTeacher, label_all, units
attempts = Attempts(Store({folder!r}), "run")
supervisor = EngineSupervisor(lambda: SharedTeacher(2, crash=True), attempts, None)
found = label_all(supervisor, units({tokens!r}))
print(json.dumps([sorted(row.place for unit in found for row in unit.quarantined),
                  sum(len(unit.requests) for unit in found)]))
"""


def test_supervisor_outlives_its_process_under_several_units(tmp_path: Path) -> None:
    """The engine is the process, and whoever runs it again hands out the units in another order."""
    tokens = [[20, 21], [POISON, 24]]
    rng = random.Random(SEED)
    print(f"seed {SEED}")
    for _ in range(12):
        rng.shuffle(tokens)
        child = CHILD.format(folder=str(tmp_path), tokens=tokens)
        done = subprocess.run(
            [sys.executable, "-c", child], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode == 0:
            break
        assert done.returncode == 11, done.stderr
    (bad,), labelled = json.loads(done.stdout)
    rows = [token for unit in tokens for token in unit]
    assert rows[bad] == POISON
    assert labelled == len(rows) - 1


def test_exclusive_access_goes_before_later_shared_access() -> None:
    lock = SharedLock()
    order: list[str] = []
    first_may_go = threading.Event()

    def use(name: str, exclusive: bool) -> None:
        with lock.exclusive() if exclusive else lock.shared():
            order.append(name)
            if name == "first":
                first_may_go.wait(5)

    threads = [threading.Thread(target=use, args=("first", False))]
    threads[0].start()
    _until(lambda: order == ["first"])
    threads.append(threading.Thread(target=use, args=("exclusive", True)))
    threads[1].start()
    _until(lambda: lock._num_waiting == 1)
    threads.append(threading.Thread(target=use, args=("newcomer", False)))
    threads[2].start()
    first_may_go.set()
    for thread in threads:
        thread.join(5)
    assert order == ["first", "exclusive", "newcomer"]


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)
