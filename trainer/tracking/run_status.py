"""What the workers of a run report to its driver: progress, notes, and the error that ended it."""

from typing import Protocol

from schemas.config import StrictModel
from schemas.errors import TutelageError


class StepStatus(StrictModel):
    """State of the training after a step.

    Attributes:
        step: global steps done, of ``num_steps``.
        tokens: tokens of the rows trained on so far.
        loss: mean per label since the last line of metrics.jsonl, nats.
        data_wait_share: share of that time in which training waited for data.
    """

    step: int
    num_steps: int
    tokens: int
    loss: float
    data_wait_share: float


class StatusReceiver(Protocol):
    """The worker's end of a `RunStatus`, which lives in another process."""

    def update(self, status: StepStatus) -> None:
        """Replaces the state of the training."""

    def note(self, text: str) -> None:
        """Adds a line for the user."""

    def fail(self, error: TutelageError) -> None:
        """Records an error that a restart cannot fix."""

    def error(self) -> TutelageError | None:
        """The error that ended the run."""


class RunStatus:
    """Holds the latest reports of the workers until the driver fetches them."""

    def __init__(self) -> None:
        self._status: StepStatus | None = None
        self._notes: list[str] = []
        self._error: TutelageError | None = None

    def update(self, status: StepStatus) -> None:
        """Replaces the state of the training."""
        self._status = status

    def note(self, text: str) -> None:
        """Adds a line for the user."""
        self._notes.append(text)

    def fail(self, error: TutelageError) -> None:
        """Keeps the first error; those of other workers follow from it."""
        self._error = self._error or error

    def error(self) -> TutelageError | None:
        """The error that ended the run."""
        return self._error

    def news(self, num_notes: int) -> tuple[StepStatus | None, list[str]]:
        """The latest state, and the notes after the first ``num_notes``."""
        return self._status, self._notes[num_notes:]
