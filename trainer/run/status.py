"""The status of a run across processes: an actor that workers report to and the driver displays."""

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
    """A `RunStatus` in a Ray actor without a CPU; can be sent to workers.

    Ray Train's own reports are barriers and reach the driver late, and its errors arrive wrapped in
    the text of remote tracebacks.
    """

    def __init__(self) -> None:
        # On the driver's own node, whose loss ends the run anyway; on any other node the actor
        # could be lost alone. Not restarted: a new one would not know the error that ended the run.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": here}
        self._actor: Any = ray.remote(**options)(RunStatus).remote()

    # Training does not wait for reports; only errors must have arrived before the worker ends.
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
    """Shows the status of a run for the duration of the block, from a thread."""
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
        except Exception:  # noqa: BLE001  (losing the display must not end the run)
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
