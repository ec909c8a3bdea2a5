"""Status that workers report to the driver: progress, notes, and the error that ended the run."""

from schemas.config import StrictModel
from schemas.errors import TutelageError


class StepStatus(StrictModel):
    """Training state after a step.

    Attributes:
        step: global steps done, of ``num_steps``.
        tokens: tokens of the rows trained on so far.
        loss: mean per label since the last line of metrics.jsonl, nats.
        data_wait_share: share of that time spent waiting for data.
    """

    step: int
    num_steps: int
    tokens: int
    loss: float
    data_wait_share: float


class RunStatus:
    """Holds the workers' reports until the driver fetches them.

    Workers run in other processes and use a subclass that forwards the calls.
    """

    def __init__(self) -> None:
        self._step: StepStatus | None = None
        self._notes: list[str] = []
        self._error: TutelageError | None = None

    def update(self, step: StepStatus) -> None:
        """Replaces the training state."""
        self._step = step

    def note(self, text: str) -> None:
        """Adds a line for the user."""
        self._notes.append(text)

    def fail(self, error: TutelageError) -> None:
        """Records an error that a restart cannot fix; keeps the first, which causes the others."""
        self._error = self._error or error

    def error(self) -> TutelageError | None:
        """Returns the error that ended the run, or None."""
        return self._error

    def news(self, num_notes: int) -> tuple[StepStatus | None, list[str]]:
        """Returns the latest state and the notes after the first ``num_notes``."""
        return self._step, self._notes[num_notes:]
