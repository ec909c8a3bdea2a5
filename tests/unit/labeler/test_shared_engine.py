"""Several units in one engine: nobody waits while all is well, nobody is blamed for a neighbour."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from test_survivor import POISON, FragileTeacher, _labels, requests

from labeler.corpus.requests import Request, requests_unit_key
from labeler.supervision.attempts import Attempts, Deaths
from labeler.supervision.shared_lock import EngineUsers
from labeler.supervision.supervisor import Survivor
from labeler.teachers.protocol import RowFailure, RowLabels
from labeler.units.unit_labels import UnitLabels
from schemas.errors import TeacherError
from schemas.storage.store import Store

SEED = int(os.environ.get("TUTELAGE_SEED", "7"))


class SharedTeacher(FragileTeacher):
    """An engine of several threads: over a certain token it dies for all that are in it."""

    shareable = True

    def __init__(self, expected: int = 1, crash: bool = False) -> None:
        super().__init__()
        # Where it crashes, units come alone later on, and wait in vain.
        self._wait_s = 0.3 if crash else 30.0
        self.most_together = 0
        self._expected = expected
        self._crash = crash
        self._in_flight = 0
        self._poisoned = False
        self._changed = threading.Condition()

    def label(
        self,
        token_ids: Sequence[np.ndarray],
        label_spans: Sequence[np.ndarray],
        row_keys: np.ndarray,
        audit_rate: float = 0.0,
    ) -> list[RowLabels | RowFailure]:
        with self._changed:
            self._in_flight += 1
            self._poisoned |= any(POISON in ids for ids in token_ids)
            self.most_together = max(self.most_together, self._in_flight)
            self._changed.notify_all()
            # The first calls wait for each other, so that they really are in flight together.
            self._changed.wait_for(lambda: self.most_together >= self._expected, self._wait_s)
            if self._poisoned and self._crash:
                os._exit(11)
            self._in_flight -= 1
            if self._poisoned:
                raise TeacherError("the engine died")
        return [_labels(len(ids)) for ids in token_ids]


def units(tokens: Sequence[Sequence[int]]) -> list[list[Request]]:
    """Requests of several units; a token stands for its row."""
    rows = iter(requests([token for unit in tokens for token in unit]))
    return [[next(rows) for _ in unit] for unit in tokens]


def label_all(survivor: Survivor, batches: list[list[Request]]) -> list[UnitLabels]:
    with ThreadPoolExecutor(len(batches)) as pool:
        return [found for found, _ in pool.map(survivor.label, batches)]


def test_units_share_an_engine(tmp_path: Path) -> None:
    teacher = SharedTeacher(expected=3)
    survivor = Survivor(lambda: teacher, Attempts(Store(str(tmp_path)), "run"), None)
    found = label_all(survivor, units([[1, 2], [3, 4], [5, 6]]))
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
    found = label_all(Survivor(make, attempts, None, tell=lines.append), batches)
    assert [len(unit.requests) for unit in found] == [4, 3, 2, 1]
    quarantined = [(row.place, row.reason) for unit in found for row in unit.quarantined]
    assert quarantined == [(5, "kills_engine")]
    assert teachers[0].most_together == 4
    assert all(teacher.most_together == 1 for teacher in teachers[1:])
    assert len(lines) == len(teachers) - 1  # once an engine, however many units were in it
    # Who only was there when it happened has nothing else against it.
    for innocent in (0, 2, 3):
        assert attempts.deaths(requests_unit_key(batches[innocent])) == Deaths(together=1)


def test_deaths_beside_others_quarantine_nobody(tmp_path: Path) -> None:
    """However often: only what died alone is held against rows."""
    attempts = Attempts(Store(str(tmp_path)), "run")
    (batch,) = units([[20]])
    for _ in range(9):
        attempts.failed(attempts.begin(requests_unit_key(batch), alone=False))
    found, _ = Survivor(SharedTeacher, attempts, None).label(batch)
    assert len(found.requests) == 1


CHILD = """
import json, sys
sys.path[:0] = {paths!r}
from labeler.supervision.attempts import Attempts
from labeler.supervision.supervisor import Survivor
from schemas.storage.store import Store
from test_shared_engine import SharedTeacher, label_all, units
survivor = Survivor(lambda: SharedTeacher(2, crash=True), Attempts(Store({folder!r}), "run"), None)
found = label_all(survivor, units({tokens!r}))
print(json.dumps([sorted(row.place for unit in found for row in unit.quarantined),
                  sum(len(unit.requests) for unit in found)]))
"""


def test_a_process_that_dies_under_several_units(tmp_path: Path) -> None:
    """The engine is the process, and whoever runs it again hands out the units in another order."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parents[2])]
    tokens = [[20, 21], [POISON, 24]]
    rng = random.Random(SEED)
    print(f"seed {SEED}")
    for _ in range(12):
        rng.shuffle(tokens)
        child = CHILD.format(paths=paths, folder=str(tmp_path), tokens=tokens)
        done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
        if done.returncode == 0:
            break
        assert done.returncode == 11, done.stderr
    (bad,), labelled = json.loads(done.stdout)
    rows = [token for unit in tokens for token in unit]
    assert rows[bad] == POISON
    assert labelled == len(rows) - 1


def test_who_wants_to_be_alone_goes_before_newcomers() -> None:
    users = EngineUsers()
    order: list[str] = []
    first_may_go = threading.Event()

    def use(name: str, alone: bool) -> None:
        with users.alone() if alone else users.together():
            order.append(name)
            if name == "first":
                first_may_go.wait(5)

    threads = [threading.Thread(target=use, args=("first", False))]
    threads[0].start()
    _until(lambda: order == ["first"])
    threads.append(threading.Thread(target=use, args=("alone", True)))
    threads[1].start()
    _until(lambda: users._num_waiting == 1)
    threads.append(threading.Thread(target=use, args=("newcomer", False)))
    threads[2].start()
    first_may_go.set()
    for thread in threads:
        thread.join(5)
    assert order == ["first", "alone", "newcomer"]


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)
