"""The status of a run across processes: an actor that the workers write to and the driver shows."""

import threading
from collections.abc import Callable
from typing import Any, Self

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from schemas.console.progress import Progress
from schemas.errors import TutelageError
from trainer.tracking.run_status import RunStatus, StepStatus


class RunStatusActor:
    """Handle of a `RunStatus` in a Ray actor without a CPU; can be sent to workers.

    Ray Train's own reports are barriers and reach the driver late, and its errors arrive wrapped in
    the text of remote tracebacks.
    """

    def __init__(self) -> None:
        # On the driver's own node, whose loss ends the run anyway; on any other node the actor
        # could be lost alone. Not restarted: a new one would not know the error that ended the run.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": here}
        self._actor: Any = ray.remote(**options)(RunStatus).remote()

    def update(self, status: StepStatus) -> None:
        """Replaces the state of the training; does not wait."""
        self._actor.update.remote(status)

    def note(self, text: str) -> None:
        """Adds a line for the user; does not wait."""
        self._actor.note.remote(text)

    def fail(self, error: TutelageError) -> None:
        """Records an error that a restart cannot fix."""
        ray.get(self._actor.fail.remote(error))

    def error(self) -> TutelageError | None:
        """The error that ended the run."""
        found: TutelageError | None = ray.get(self._actor.error.remote())
        return found

    def news(self, num_notes: int) -> tuple[StepStatus | None, list[str]]:
        """The latest state, and the notes after the first ``num_notes``."""
        news: tuple[StepStatus | None, list[str]] = ray.get(self._actor.news.remote(num_notes))
        return news


class StatusDisplay:
    """Fetches a run's status every second, in a thread, and shows it. A context manager."""

    INTERVAL_S = 1.0

    def __init__(
        self, news: Callable[[int], tuple[StepStatus | None, list[str]]], progress: Progress
    ) -> None:
        """
        Args:
            news: ``RunStatus.news``, or the actor's.
            progress: where to show it.
        """
        self._news, self._progress = news, progress
        self._num_notes = 0
        self._shown: StepStatus | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._progress.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._done.set()
        self._thread.join()
        self._progress.__exit__(*exception)

    def _run(self) -> None:
        while not self._done.wait(self.INTERVAL_S):
            self._fetch()
        self._fetch()

    def _fetch(self) -> None:
        try:
            status, notes = self._news(self._num_notes)
        except Exception:  # noqa: BLE001  (losing the display must not end the run)
            return
        self._num_notes += len(notes)
        for text in notes:
            self._progress.say(text)
        if status is None or status == self._shown:
            return
        self._shown = status
        self._progress.show(
            status.step,
            status.num_steps,
            f"step {status.step}/{status.num_steps}",
            tokens=status.tokens,
            facts=(
                f"loss {status.loss:.4f}",
                f"{status.data_wait_share:.1%} waiting for data",
            ),
        )
