"""What is said while no teacher has come up."""

import pytest

from labeler.run.actors.ledger import Ledger
from labeler.run.ray_cluster.resources import Resources
from labeler.run.ray_cluster.startup_notice import DELAY_S, StartupNotice

ONE_CPU = Resources(actor_cpus=1.0, actor_gpus=0.0, actor_threads=0, task_cpus=1.0)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds = [0.0]
    monkeypatch.setattr("labeler.run.ray_cluster.startup_notice.time.monotonic", lambda: seconds[0])
    return seconds


def test_notice_is_silent_for_a_teacher_that_starts_soon(now: list[float]) -> None:
    lines: list[str] = []
    wait = StartupNotice(ONE_CPU, 1, lines.append, dict)
    for now[0] in (0.0, DELAY_S - 1):
        wait.update(is_up=False)
    assert not wait.is_over
    wait.update(is_up=True)
    assert wait.is_over
    assert lines == []


def test_notice_reports_start_and_end_of_waiting_once(now: list[float]) -> None:
    lines: list[str] = []
    wait = StartupNotice(ONE_CPU, 1, lines.append, dict)  # Ray names no resource that is used up
    for now[0] in (DELAY_S, DELAY_S + 1, 1000.0):
        wait.update(is_up=False)
    now[0] = 3605.0
    wait.update(is_up=True)
    assert lines == [
        "waiting for 1 teacher of 1 CPU, 0 GPU: the cluster has 0 CPU, 0 GPU free; "
        "other jobs, or teachers that are still starting, use the rest",
        "a teacher started after 1h00m",
    ]


def test_teachers_over_several_nodes_are_told_by_all_that_they_need(now: list[float]) -> None:
    lines: list[str] = []
    spread = Resources(1.0, 0.0, 0, 1.0, min_replicas=2, max_replicas=2, bundles=8)
    wait = StartupNotice(spread, 2, lines.append, lambda: {"CPU": 90.5, "GPU": 12.0})
    now[0] = DELAY_S
    wait.update(is_up=False)
    assert lines == [
        "waiting for 2 teachers of 8 CPU, 8 GPU: the cluster has 90.5 CPU, 12 GPU free; "
        "it is still starting, or no single node has that much free"
    ]


def test_ledger_knows_teachers_before_their_first_claim() -> None:
    ledger = Ledger(bytes_total=0)
    assert not ledger.report()[0].is_teacher_up
    ledger.teacher_up("a")
    assert ledger.report()[0].is_teacher_up
    assert ledger.claim_parity_check("a")
    ledger.teacher_up("a")  # it crashed and was restarted
    assert ledger.claim_parity_check("b")
