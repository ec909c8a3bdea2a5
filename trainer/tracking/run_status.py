"""What the workers of a run report to its driver: progress, notes, and the error that ended it."""

from schemas.config import StrictModel
from schemas.errors import TutelageError


class StepStatus(StrictModel):
    """State of the training after a step.

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
    """Holds the reports of the workers until the driver fetches them.

    Workers are other processes: they hold a subclass that forwards the calls.
    """

    def __init__(self) -> None:
        self._step: StepStatus | None = None
        self._notes: list[str] = []
        self._error: TutelageError | None = None

    def update(self, step: StepStatus) -> None:
        """Replaces the state of the training."""
        self._step = step

    def note(self, text: str) -> None:
        """Adds a line for the user."""
        self._notes.append(text)

    def fail(self, error: TutelageError) -> None:
        """Records an error that a restart cannot fix: the first; others follow from it."""
        self._error = self._error or error

    def error(self) -> TutelageError | None:
        """The error that ended the run."""
        return self._error

    def news(self, num_notes: int) -> tuple[StepStatus | None, list[str]]:
        """The latest state, and the notes after the first ``num_notes``."""
        return self._step, self._notes[num_notes:]
