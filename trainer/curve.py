"""The learning curve: metrics.jsonl, and TensorBoard events where that is installed."""

import json
import os
from pathlib import Path
from typing import Any

from schemas.config import StrictModel
from trainer.run_folder import write_atomic


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
    """Writes points. Only one process may have it open."""

    def __init__(self, metrics: Path, tensorboard: Path | None, done: int) -> None:
        """
        Args:
            metrics: ``RUN/metrics.jsonl``.
            tensorboard: folder of event files; None: write none.
            done: steps of the checkpoint that the run goes on from; later points of a process that
                was killed are removed, since they come again.
        """
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        kept = [line for line in lines if _step(line) <= done]
        write_atomic(metrics, "".join(f"{line}\n" for line in kept).encode())
        self._file = metrics.open("a")
        self._events = _summary_writer(tensorboard, done) if tensorboard is not None else None

    def append(self, point: Point) -> None:
        """Adds a point, durably."""
        self._file.write(point.model_dump_json() + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._events is not None:
            for name, value in point.model_dump(exclude={"step"}).items():
                self._events.add_scalar(f"train/{name}", value, point.step)
            self._events.flush()

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def _step(line: str) -> float:
    """Step of a line; infinity for one that was cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")


def _summary_writer(folder: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=done + 1)
