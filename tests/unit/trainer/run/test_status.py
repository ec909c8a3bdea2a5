"""What the user sees of a run while it trains."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from schemas.console.progress import Progress
from schemas.errors import DamagedError, StudentError
from trainer.run.status import RunStatusActor, shown
from trainer.tracking.run_status import RunStatus, StepStatus

STATUS = StepStatus(step=120, num_steps=600, tokens=90_000, loss=3.21456, data_wait_share=0.0123)
LINE = "train: step 120/600 | loss 3.2146 | 1.2% waiting for data"


def test_the_first_error_is_kept() -> None:
    status = RunStatus()
    assert status.error() is None
    status.fail(DamagedError("the cause"))
    status.fail(StudentError("its consequence"))
    assert str(status.error()) == "the cause"


def test_the_actor_is_on_the_drivers_node(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {}

    def remote(**given: Any) -> Any:
        options.update(given)
        return lambda kind: SimpleNamespace(remote=kind)

    here = SimpleNamespace(get_node_id=lambda: "ab" * 28)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: here)
    monkeypatch.setattr(ray, "remote", remote)
    RunStatusActor()
    assert options["scheduling_strategy"].node_id == "ab" * 28
    assert not options["scheduling_strategy"].soft


def test_notes_are_shown_once_and_the_last_state_always(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status = RunStatus()
    status.note("one")
    status.note("two")
    with shown(status, Progress("train")):
        status.update(STATUS)
    assert capsys.readouterr().err.splitlines() == ["one", "two", LINE]


def test_a_lost_status_does_not_end_the_run() -> None:
    class Lost(RunStatus):
        def news(self, num_notes: int) -> tuple[StepStatus | None, list[str]]:
            raise ConnectionError

    with shown(Lost(), Progress("train")):
        pass
