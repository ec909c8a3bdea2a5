"""The learning curve: metrics.jsonl, and TensorBoard events where that is installed."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from schemas.config import StrictModel
from schemas.storage import Store
from trainer.run_folder import METRICS, TENSORBOARD
from trainer.step_lines import StepLines


class Point(StrictModel):
    """One line of metrics.jsonl: means over the steps since the line before.

    Attributes:
        step: global steps done.
        tokens: tokens of the rows trained on so far.
        loss: per label, the loss that is trained on.
        ce: cross-entropy of the tokens in the text, nats per label.
        kl: divergence from the teacher as the target defines it, nats per label; 0 for hard labels.
        lr: learning rate of the last of the steps.
        grad_norm: global gradient norm of the last of the steps, before clipping.
        tokens_per_s: of all workers.
        data_wait_share: share of the time that training waited for data.
    """

    step: int
    tokens: int
    loss: float
    ce: float
    kl: float
    lr: float
    grad_norm: float
    tokens_per_s: float
    data_wait_share: float


class Curve:
    """Writes points. Only one process may have it open.

    On a local file system every point is durable at once. On an object store, which cannot append,
    all are when ``flush`` returns; it is called before every checkpoint, so that no point before
    one is lost.
    """

    def __init__(self, store: Store, tensorboard: bool, done: int) -> None:
        """
        Args:
            store: the run's folder.
            tensorboard: whether to write event files.
            done: steps of the checkpoint that the run goes on from; later points of a process that
                was killed are removed, since they come again.
        """
        self._store = store
        self._lines = StepLines(store, METRICS, done)
        self._folder = Path(store.path(TENSORBOARD) if store.is_local else tempfile.mkdtemp())
        self._events = _summary_writer(self._folder, done) if tensorboard else None

    def append(self, point: Point) -> None:
        """Adds a point."""
        self._lines.append(point.model_dump_json())
        if self._store.is_local:
            self._lines.flush()
        if self._events is not None:
            for name, value in point.model_dump(exclude={"step"}).items():
                self._events.add_scalar(f"train/{name}", value, point.step)
            self._events.flush()

    def flush(self) -> None:
        """Makes all points durable."""
        self._lines.flush()
        if self._store.is_local or self._events is None:
            return
        for path in self._folder.rglob("*"):
            if path.is_file():
                rel = f"{TENSORBOARD}/{path.relative_to(self._folder).as_posix()}"
                self._store.write_bytes(rel, path.read_bytes())

    def close(self) -> None:
        """Closes the files."""
        if self._events is not None:
            self._events.close()
        self.flush()
        self._lines.close()
        if not self._store.is_local:
            shutil.rmtree(self._folder, ignore_errors=True)


def _summary_writer(folder: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=done + 1)
