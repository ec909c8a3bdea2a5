"""Reports a rank's steps: the learning curve on disk, and the status shown to the user."""

import resource
import sys
import time

import torch
import torch.distributed as dist

from trainer.checkpoints.train_progress import TrainProgress
from trainer.config.train import EvalConfig
from trainer.data.loader import StepBatch
from trainer.engine.train_step import StepResult
from trainer.tracking.learning_curve import EvalPoint, LearningCurve, Point
from trainer.tracking.run_status import RunStatus, StepStatus
from trainer.tracking.step_lines import RowLog

SUMS = ("loss", "ce", "kl", "weight", "tokens", "seconds", "wait_s")
"""Sums over the steps between two points of the learning curve; seconds are those of one rank."""

STATUS_INTERVAL_S = 1.0

RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024
"""Unit of getrusage's ru_maxrss: bytes on macOS, KiB elsewhere."""


def no_sums() -> dict[str, float]:
    """Returns zero for every sum."""
    return dict.fromkeys(SUMS, 0.0)


class Reporter:
    """Accumulates steps. Every rank has one, since checkpoints store the sums; rank 0 writes."""

    def __init__(
        self, status: RunStatus, curve: LearningCurve | None, row_log: RowLog | None, num_steps: int
    ) -> None:
        """
        Args:
            status: receives the training state and lines for the user.
            curve: on rank 0, else None.
            row_log: on rank 0 with ``log.rows``, else None.
            num_steps: steps of the run.
        """
        self._status, self._curve, self._row_log = status, curve, row_log
        self._files = [file for file in (curve, row_log) if file is not None]
        self._num_steps = num_steps
        self._own = no_sums()  # since this process began
        self._status_at = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of all workers since this process started."""
        return ratio(self._own["tokens"], self._own["seconds"])

    @property
    def seconds(self) -> float:
        """Seconds spent in steps since this process started."""
        return self._own["seconds"]

    @property
    def data_wait_share(self) -> float:
        """Share of that time spent waiting for data."""
        return ratio(self._own["wait_s"], self._own["seconds"])

    def add(
        self,
        old: TrainProgress,
        batch: StepBatch,
        result: StepResult,
        seconds: float,
        wait_s: float,
    ) -> TrainProgress:
        """Adds a step. Returns the progress after it."""
        sums = {
            "loss": result.loss,
            "ce": result.ce,
            "kl": result.kl,
            "weight": result.weight,
            "tokens": float(batch.num_tokens),
            "seconds": seconds,
            "wait_s": wait_s,
        }
        self._own = {name: self._own[name] + sums[name] for name in SUMS}
        if self._row_log is not None:
            self._row_log.add(old.step + 1, batch.packs)
        if result.warning:
            self.note(f"warning: {result.warning}")
        return old.model_copy(
            update={
                "step": old.step + 1,
                "loader": batch.state,
                "tokens": old.tokens + batch.num_tokens,
                "labels": old.labels + batch.num_labels,
                "pending": {name: old.pending[name] + sums[name] for name in SUMS},
            }
        )

    def add_point(self, progress: TrainProgress, lr: float, grad_norm: float) -> TrainProgress:
        """Writes a point of the learning curve. Returns the progress after it. Collective."""
        rss, gpu = peak_memory()
        sums = progress.pending
        losses = {name: ratio(sums[name], sums["weight"]) for name in ("loss", "ce", "kl")}
        point = Point(
            step=progress.step,
            tokens=progress.tokens,
            loss=losses["loss"],
            ce=losses["ce"],
            kl=losses["kl"],
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_s=ratio(sums["tokens"], sums["seconds"]),
            data_wait_share=ratio(sums["wait_s"], sums["seconds"]),
            peak_rss_bytes=rss,
            peak_gpu_bytes=gpu,
        )
        self._write(point)
        return progress.model_copy(
            update={
                "final_loss": point.loss,
                "pending": no_sums(),
                "metrics": progress.metrics | losses,
            }
        )

    def add_evaluation(
        self, progress: TrainProgress, point: EvalPoint, config: EvalConfig
    ) -> TrainProgress:
        """Writes the result of an evaluation. Returns the progress after it."""
        self._write(point)
        measured = {"eval_ce": point.ce}
        text = f"step {point.step}: held-out cross-entropy {point.ce:.4f}"
        if point.kl is not None:
            measured["eval_kl"] = point.kl
            text += f", KL to the teacher at least {point.kl:.4f}"
        self.note(text)
        value = measured[f"eval_{config.metric}"]
        return progress.model_copy(
            update={
                "metrics": progress.metrics | measured,
                "evaluation": progress.evaluation.after(point.step, value, config),
            }
        )

    def send_status(self, progress: TrainProgress) -> None:
        """Sends the training state; call it before ``add_point``, which resets the sums."""
        now = time.perf_counter()
        is_last = progress.step == self._num_steps
        if self._curve is None or (now - self._status_at < STATUS_INTERVAL_S and not is_last):
            return
        self._status_at = now
        sums = progress.pending
        self._status.update(
            StepStatus(
                step=progress.step,
                num_steps=self._num_steps,
                tokens=progress.tokens,
                loss=ratio(sums["loss"], sums["weight"]),
                data_wait_share=ratio(sums["wait_s"], sums["seconds"]),
            )
        )

    def note(self, text: str) -> None:
        """Shows a line to the user, once for all ranks."""
        if self._curve is not None:
            self._status.note(text)

    def flush(self) -> None:
        """Makes everything written so far durable."""
        for file in self._files:
            file.flush()

    def close(self) -> None:
        """Closes the files."""
        for file in self._files:
            file.close()

    def _write(self, point: Point | EvalPoint) -> None:
        if self._curve is not None:
            for line in self._curve.append(point):
                self.note(f"warning: {line}")


def peak_memory() -> tuple[int, int]:
    """Peak bytes over ranks, of the process and of its GPU tensors. Collective."""
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT_BYTES
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"  # NCCL reduces GPU tensors only
    peaks = torch.tensor([rss, gpu], dtype=torch.int64, device=device)
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    rss, gpu = peaks.tolist()
    return rss, gpu


def ratio(part: float, total: float) -> float:
    """part / total; 0 if total is 0."""
    return part / total if total else 0.0
