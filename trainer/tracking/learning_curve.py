"""The learning curve of a run: metrics.jsonl, TensorBoard, and external trackers."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from schemas.config import StrictModel
from schemas.storage.store import Store
from trainer.config.train import TrainConfig
from trainer.run_folder import METRICS, TENSORBOARD
from trainer.tracking.external import Trackers, open_trackers
from trainer.tracking.step_lines import StepLines


class Point(StrictModel):
    """One line of metrics.jsonl: means over the steps since the previous line.

    Attributes:
        step: global steps done.
        tokens: tokens of the rows trained on so far.
        loss: training loss per label.
        ce: cross-entropy with the text, nats per label.
        kl: value of the objective, nats per label; 0 for hard labels.
        lr: learning rate of the last step.
        grad_norm: global gradient norm of the last step, before clipping.
        tokens_per_s: throughput of all workers.
        data_wait_share: share of the time spent waiting for data.
        peak_rss_bytes: peak memory of any worker process.
        peak_gpu_bytes: peak memory of the tensors on any worker's GPU; 0 without GPUs.
    """

    kind: str = "train"
    step: int
    tokens: int
    loss: float
    ce: float
    kl: float
    lr: float
    grad_norm: float
    tokens_per_s: float
    data_wait_share: float
    peak_rss_bytes: int
    peak_gpu_bytes: int


class EvalPoint(StrictModel):
    """One line of metrics.jsonl with ``kind`` "eval": the student on the held-out rows.

    Attributes:
        step: global steps done.
        ce: cross-entropy with the text, nats per label.
        kl: a lower bound of KL(teacher || student), nats per label, on the cached ids and one
            bucket for all others (the ghost objective at temperature 1). None if the labels are
            tokens only.
        labels: labelled positions evaluated.
        seconds: duration of the evaluation.
    """

    kind: str = "eval"
    step: int
    ce: float
    kl: float | None
    labels: int
    seconds: float


class LearningCurve:
    """Writes points. Only one process may have it open.

    On a local file system every point is durable immediately. On an object store, which cannot
    append, points are durable after ``flush``, which precedes every checkpoint, so no point before
    a checkpoint is lost.
    """

    def __init__(self, store: Store, config: TrainConfig, done: int) -> None:
        """
        Args:
            store: the run's folder.
            config: of the run; ``log`` selects TensorBoard and the trackers.
            done: see `StepLines`.
        """
        self._store = store
        self._lines = StepLines(store, METRICS, done)
        self._folder = Path(store.path(TENSORBOARD) if store.is_local else tempfile.mkdtemp())
        self._events = _summary_writer(self._folder, done) if config.log.tensorboard else None
        self._trackers = Trackers(open_trackers(config))

    def append(self, point: Point | EvalPoint) -> list[str]:
        """Adds a point. Returns a line for each tracker that failed."""
        self._lines.append(point.model_dump_json())
        if self._store.is_local:
            self._lines.flush()
        fields = point.model_dump(exclude={"kind", "step"}, exclude_none=True)
        values = {f"{point.kind}/{name}": value for name, value in fields.items()}
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, point.step)
            self._events.flush()
        return self._trackers.log(values, point.step)

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
        self._trackers.close()
        self.flush()
        self._lines.close()
        if not self._store.is_local:
            shutil.rmtree(self._folder, ignore_errors=True)


def _summary_writer(folder: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # TensorBoard hides points of a killed process from purge_step on, since they are repeated.
    return SummaryWriter(str(folder), purge_step=done + 1)
