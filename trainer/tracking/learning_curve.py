"""The learning curve: metrics.jsonl, and TensorBoard and trackers of experiments beside it."""

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
        peak_rss_bytes: most memory that any worker's process ever held.
        peak_gpu_bytes: most memory that tensors on any worker's GPU ever took; 0 without GPUs.
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
        ce: cross-entropy of the tokens in the text, nats per label.
        kl: a lower bound of KL(teacher || student), nats per label: over the cached ids and one
            bucket for all others (the ghost target at temperature 1). None for labels that are
            tokens alone.
        labels: labelled positions that were looked at.
        seconds: that it took.
    """

    kind: str = "eval"
    step: int
    ce: float
    kl: float | None
    labels: int
    seconds: float


class Curve:
    """Writes points. Only one process may have it open.

    On a local file system every point is durable at once. On an object store, which cannot append,
    all are when ``flush`` returns; it is called before every checkpoint, so that no point before
    one is lost.
    """

    def __init__(self, store: Store, config: TrainConfig, done: int) -> None:
        """
        Args:
            store: the run's folder.
            config: of the run; ``log`` says who else gets the points.
            done: steps of the checkpoint that the run goes on from; later points of a process that
                was killed are removed, since they come again.
        """
        self._store = store
        self._lines = StepLines(store, METRICS, done)
        self._folder = Path(store.path(TENSORBOARD) if store.is_local else tempfile.mkdtemp())
        self._events = _summary_writer(self._folder, done) if config.log.tensorboard else None
        self._trackers = Trackers(open_trackers(config))

    def append(self, point: Point | EvalPoint) -> list[str]:
        """Adds a point. Returns what went wrong with trackers, a line each; mostly nothing."""
        self._lines.append(point.model_dump_json())
        if self._store.is_local:
            self._lines.flush()
        values = point.model_dump(exclude={"kind", "step"}, exclude_none=True)
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(f"{point.kind}/{name}", value, point.step)
            self._events.flush()
        named = {f"{point.kind}/{name}": value for name, value in values.items()}
        return self._trackers.log(named, point.step)

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
    return SummaryWriter(str(folder), purge_step=done + 1)
