"""Shares the status of a run across processes: workers report to an actor, the driver shows it."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from schemas.console.progress import Progress
from schemas.errors import TutelageError
from trainer.tracking.run_status import RunStatus, StepStatus

POLL_INTERVAL_S = 1.0


class RunStatusActor(RunStatus):
    """A `RunStatus` in a Ray actor that reserves no CPU; can be sent to workers.

    Ray Train's own reports act as barriers and reach the driver late, and its errors arrive wrapped
    in remote tracebacks.
    """

    def __init__(self) -> None:
        # Pinned to the driver's node: losing that node ends the run anyway, whereas the actor could
        # be lost alone elsewhere. Not restarted: a new actor would have lost the run's error.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": here}
        self._actor: Any = ray.remote(**options)(RunStatus).remote()

    # Reports are fire-and-forget; only errors must arrive before the worker exits.
    def update(self, step: StepStatus) -> None:
        self._actor.update.remote(step)

    def note(self, text: str) -> None:
        self._actor.note.remote(text)

    def fail(self, error: TutelageError) -> None:
        ray.get(self._actor.fail.remote(error))

    def error(self) -> TutelageError | None:
        found: TutelageError | None = ray.get(self._actor.error.remote())
        return found

    def news(self, num_notes: int) -> tuple[StepStatus | None, list[str]]:
        found: tuple[StepStatus | None, list[str]] = ray.get(self._actor.news.remote(num_notes))
        return found


@contextlib.contextmanager
def shown(status: RunStatus, progress: Progress) -> Iterator[None]:
    """Displays the status of a run from a thread while the block runs."""
    done = threading.Event()
    thread = threading.Thread(target=_show, args=(status, progress, done), daemon=True)
    with progress:
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _show(status: RunStatus, progress: Progress, done: threading.Event) -> None:
    num_notes, latest, is_last = 0, None, False
    while not is_last:
        is_last = done.wait(POLL_INTERVAL_S)
        try:
            step, notes = status.news(num_notes)
        except Exception:  # noqa: BLE001  (a display failure must not end the run)
            continue
        num_notes += len(notes)
        for text in notes:
            progress.say(text)
        if step is not None and step != latest:
            latest = step
            progress.show(
                step.step,
                step.num_steps,
                f"step {step.step}/{step.num_steps}",
                tokens=step.tokens,
                facts=(f"loss {step.loss:.4f}", f"{step.data_wait_share:.1%} waiting for data"),
            )
