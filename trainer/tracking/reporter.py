"""What a worker says of its steps: the learning curve on disk, and progress for who waits."""

import resource
import sys
import time

import torch
import torch.distributed as dist

from trainer.checkpoints.train_progress import TrainProgress
from trainer.config.train import EvalConfig
from trainer.data.loader import StepBatch
from trainer.engine.train_step import StepResult
from trainer.tracking.learning_curve import Curve, EvalPoint, Point
from trainer.tracking.row_log import RowLog
from trainer.tracking.run_status import StatusReceiver, StepStatus

SUMS = ("loss", "ce", "kl", "weight", "tokens", "seconds", "wait_s")
"""What is added up between two points of the learning curve. Seconds are those of one rank."""

POST_EVERY_S = 1.0

RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024
"""What getrusage counts in."""


def no_sums() -> dict[str, float]:
    """Sums of no steps."""
    return dict.fromkeys(SUMS, 0.0)


class Reporter:
    """Adds up steps. Every rank has one, since checkpoints hold the sums; rank 0's also writes."""

    def __init__(
        self,
        status: StatusReceiver,
        curve: Curve | None,
        row_log: RowLog | None,
        num_steps: int,
    ) -> None:
        """
        Args:
            status: where the user's lines and the state of the training go.
            curve: rank 0's, None on the others.
            row_log: likewise, where it is asked for.
            num_steps: of the whole run.
        """
        self._status, self._curve, self._row_log = status, curve, row_log
        self._num_steps = num_steps
        self._here = no_sums()  # of this process alone
        self._posted_at = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Of all workers, since this process began."""
        return ratio(self._here["tokens"], self._here["seconds"])

    @property
    def seconds(self) -> float:
        """That steps took since this process began."""
        return self._here["seconds"]

    @property
    def data_wait_share(self) -> float:
        """Chunk of the time since this process began that it waited for data."""
        return ratio(self._here["wait_s"], self._here["seconds"])

    def add(
        self,
        old: TrainProgress,
        batch: StepBatch,
        result: StepResult,
        seconds: float,
        wait_s: float,
    ) -> TrainProgress:
        """The progress after one more step."""
        sums = {
            "loss": result.loss,
            "ce": result.ce,
            "kl": result.kl,
            "weight": result.weight,
            "tokens": float(batch.num_tokens),
            "seconds": seconds,
            "wait_s": wait_s,
        }
        self._here = {name: self._here[name] + sums[name] for name in SUMS}
        if self._row_log is not None:
            self._row_log.append(old.step + 1, batch.packs)
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

    def point(self, progress: TrainProgress, lr: float, grad_norm: float) -> TrainProgress:
        """Writes a point of the learning curve. Returns the progress after it. Collective."""
        rss, gpu = peak_memory()
        sums = progress.pending
        point = Point(
            step=progress.step,
            tokens=progress.tokens,
            loss=ratio(sums["loss"], sums["weight"]),
            ce=ratio(sums["ce"], sums["weight"]),
            kl=ratio(sums["kl"], sums["weight"]),
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_s=ratio(sums["tokens"], sums["seconds"]),
            data_wait_share=ratio(sums["wait_s"], sums["seconds"]),
            peak_rss_bytes=rss,
            peak_gpu_bytes=gpu,
        )
        self._write(point)
        measured = {"loss": point.loss, "ce": point.ce, "kl": point.kl}
        return progress.model_copy(
            update={
                "final_loss": point.loss,
                "pending": no_sums(),
                "metrics": progress.metrics | measured,
            }
        )

    def evaluated(
        self, progress: TrainProgress, point: EvalPoint, config: EvalConfig
    ) -> TrainProgress:
        """Writes what an evaluation gave. Returns the progress after it."""
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

    def post(self, progress: TrainProgress) -> None:
        """Reports the state of the training to the user; call it before ``point``."""
        now = time.perf_counter()
        is_last = progress.step == self._num_steps
        if self._curve is None or (now - self._posted_at < POST_EVERY_S and not is_last):
            return
        self._posted_at = now
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

    def _write(self, point: Point | EvalPoint) -> None:
        if self._curve is not None:
            for line in self._curve.append(point):
                self.note(f"warning: {line}")

    def flush(self) -> None:
        """Makes all that was written durable."""
        for file in (self._curve, self._row_log):
            if file is not None:
                file.flush()

    def close(self) -> None:
        """Closes the files."""
        for file in (self._curve, self._row_log):
            if file is not None:
                file.close()


def peak_memory() -> tuple[int, int]:
    """Most bytes that any rank's process and any rank's GPU tensors ever took. Collective."""
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT_BYTES
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    peaks = torch.tensor([rss, gpu], dtype=torch.int64, device=device)
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    rss, gpu = peaks.tolist()
    return rss, gpu


def ratio(part: float, whole: float) -> float:
    """part / whole, 0 of nothing."""
    return part / whole if whole else 0.0
