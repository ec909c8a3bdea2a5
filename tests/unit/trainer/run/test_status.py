"""What the user sees of a run while it trains."""

import pytest

from schemas.console.progress import Progress
from schemas.errors import DamagedError, StudentError
from trainer.run.status import shown
from trainer.tracking.run_status import RunStatus, StepStatus

STATUS = StepStatus(step=120, num_steps=600, tokens=90_000, loss=3.21456, data_wait_share=0.0123)
LINE = "train: step 120/600 | loss 3.2146 | 1.2% waiting for data"


def test_status_keeps_the_first_error() -> None:
    status = RunStatus()
    assert status.error() is None
    status.fail(DamagedError("the cause"))
    status.fail(StudentError("its consequence"))
    assert str(status.error()) == "the cause"


def test_status_shows_notes_once_and_the_last_state_always(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status = RunStatus()
    status.note("one")
    status.note("two")
    with shown(status, Progress("train")):
        status.update(STATUS)
    assert capsys.readouterr().err.splitlines() == ["one", "two", LINE]


def test_lost_status_does_not_end_the_run() -> None:
    class Lost(RunStatus):
        def news(self, num_notes: int) -> tuple[StepStatus | None, list[str]]:
            raise ConnectionError

    with shown(Lost(), Progress("train")):
        pass
