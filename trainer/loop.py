"""One worker of a training run: what Ray Train starts on every rank.

**Exact token means.** The loss of a global step is the mean over the labels of all ranks and
micro-batches. Their number N is summed before the first backward pass; then every micro-batch gives
``backward(W * loss_sum / N)``, where W, the number of ranks, undoes the mean that DeepSpeed takes
over them, and ``scale_wrt_gas=False`` keeps it from dividing again. So neither the split into
micro-batches nor the number of workers changes the gradient.
"""

import contextlib
import os
import time
from dataclasses import dataclass
from typing import Any

import ray
import torch
import torch.distributed as dist

from schemas.errors import ConfigError, StudentError, TutelageError
from schemas.view import View
from trainer.board import Progress
from trainer.checkpoint import TrainProgress, find_checkpoint, load_checkpoint, save_checkpoint
from trainer.config import TrainConfig
from trainer.curve import Curve, Point
from trainer.export import export_student, model_card
from trainer.loader import Loader, MicroBatch, StepBatch, common_record
from trainer.loss_checks import approximation
from trainer.plan import LoaderState, read_row_table
from trainer.run_folder import RunFolder, TrainSummary
from trainer.schedule import lr_factor

SUMS = ("loss", "ce", "kl", "weight", "tokens", "seconds", "wait_s")
"""What is added up between two points of the learning curve. Seconds are those of one rank."""

PROGRESS_EVERY_S = 1.0


@dataclass(frozen=True)
class TrainJob:
    """What every worker is handed.

    Attributes:
        folder: where relative paths begin: the driver's working directory.
        owner: from ``RunFolder.claim``.
        view_hash: of the view as the driver saw it.
        num_steps: global steps of the whole run.
        board: handle of the ``trainer.board.Board`` actor.
    """

    config: TrainConfig
    folder: str
    owner: str
    view_hash: str
    num_steps: int
    board: Any


def train_worker(job: TrainJob) -> None:
    """Trains, or goes on training, to the end of the run.

    Ray Train starts all workers again when one is lost. An error that a person has to mend would
    only come again, so it is pinned to the board and ends every later attempt at once.
    """
    if ray.get(job.board.error.remote()) is not None:
        return
    with contextlib.suppress(OSError):  # absolute paths need no such folder on this node
        os.chdir(job.folder)
    try:
        Worker(job).run()
    except TutelageError as error:
        ray.get(job.board.fail.remote(error))
        raise


class Worker:
    """The state of one rank."""

    def __init__(self, job: TrainJob) -> None:
        from trainer.engine import build_engine, prepare_process
        from trainer.student import StudentWithHead, build_student

        self._started = time.perf_counter()
        self._job, self._config = job, job.config
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        prepare_process(self._config)
        self._folder = RunFolder(self._config.run)
        self._folder.check_owner(job.owner)
        self._view = _open_view(job)
        self._label_sets = [label_set.fingerprint for label_set in self._view.label_sets]
        self._rows = read_row_table(self._view, self._config.data)
        model, self._tokenizer = build_student(self._config.student)
        self._vocab_size = model.get_output_embeddings().weight.shape[0]
        student = StudentWithHead(model, self._config.deepspeed.gradient_checkpointing)
        self._engine = build_engine(student, self._config)
        self._progress = self._resume()
        self._resumed_from = self._progress.step
        self._curve = self._open_curve()
        self._here = dict.fromkeys(SUMS, 0.0)  # sums of this process alone
        self._posted_at = 0.0
        self._grad_norm = 0.0

    def run(self) -> None:
        """Trains to the last step, exports the student, and writes the summary."""
        loader = Loader(
            self._config,
            self._view,
            self._rows,
            self._progress.loader,
            self._rank,
            self._vocab_size,
        )
        try:
            while self._progress.step < self._job.num_steps:
                before = time.perf_counter()
                batch = next(loader)
                sums = self._train_step(batch)
                sums["seconds"] = time.perf_counter() - before
                sums["wait_s"] = loader.wait_s
                self._account(batch, sums)
                self._keep()
        finally:
            loader.close()
        self._finish()

    def _train_step(self, batch: StepBatch) -> dict[str, float]:
        """One optimizer step. Returns the sums over all ranks that make the learning curve."""
        engine, step = self._engine, self._progress.step
        weight = self._sum_over_ranks([sum(m.weight for m in batch.micro_batches)])[0]
        scale = self._world_size / weight if weight else 0.0
        parts = torch.zeros(3, dtype=torch.float64, device=engine.device)
        self._set_learning_rate(self._lr(step))
        for number, micro_batch in enumerate(batch.micro_batches, start=1):
            loss_sum, sums = self._forward(micro_batch)
            engine.backward(loss_sum * scale, scale_wrt_gas=False)
            parts += torch.stack([sums["loss"], sums["ce"], sums["kl"]])
            if number == len(batch.micro_batches):
                loss, ce, kl = self._sum_over_ranks(parts)
                self._update(step + 1, loss)
            else:
                engine.step()
        return {"loss": loss, "ce": ce, "kl": kl, "weight": weight, "tokens": batch.num_tokens}

    def _forward(self, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        device = self._engine.device
        input_ids = batch.input_ids.to(device, non_blocking=True)
        position_ids = batch.position_ids.to(device, non_blocking=True)
        if self._config.student.attn_implementation == "flash_attention_2":
            # Its kernel finds documents by position ids in a single sequence only.
            input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
        targets = batch.targets.to(device, non_blocking=True)
        result: tuple[torch.Tensor, dict[str, torch.Tensor]] = self._engine(
            input_ids, position_ids, targets, self._config.loss
        )
        return result

    def _update(self, step: int, loss: float) -> None:
        """Steps the optimizer, unless the loss or the gradient is not finite."""
        from trainer.engine import gradient_norm

        norm = gradient_norm(self._engine)
        _check_finite("loss", loss, step)
        if norm is not None:
            _check_finite("gradient norm", norm, step)
        self._engine.step()
        if norm is None:
            norm = float(self._engine.get_global_grad_norm())
            _check_finite("gradient norm", norm, step)
        self._grad_norm = norm

    def _account(self, batch: StepBatch, sums: dict[str, float]) -> None:
        """Adds a step to the progress, and to the learning curve where a point is due."""
        old = self._progress
        self._here = {name: self._here[name] + sums[name] for name in SUMS}
        self._progress = old.model_copy(
            update={
                "step": old.step + 1,
                "loader": batch.state,
                "tokens": old.tokens + batch.num_tokens,
                "labels": old.labels + batch.num_labels,
                "pending": {name: old.pending[name] + sums[name] for name in SUMS},
            }
        )
        self._post()
        step = self._progress.step
        if step % self._config.log.every_steps == 0 or step == self._job.num_steps:
            point = self._point()
            if self._curve is not None:
                self._folder.check_owner(self._job.owner)
                self._curve.append(point)
            self._progress = self._progress.model_copy(
                update={"final_loss": point.loss, "pending": dict.fromkeys(SUMS, 0.0)}
            )

    def _keep(self) -> None:
        """Saves a checkpoint where one is due."""
        step, every = self._progress.step, self._config.checkpoint.every_steps
        if step % every == 0 or step == self._job.num_steps:
            self._folder.check_owner(self._job.owner)
            save_checkpoint(
                self._engine,
                self._folder.checkpoints,
                self._progress,
                self._label_sets,
                self._config.checkpoint.keep,
            )

    def _finish(self) -> None:
        done, here = self._progress, self._here
        self._folder.check_owner(self._job.owner)
        card = model_card(
            self._config,
            self._label_sets,
            self._view.view_hash,
            len(self._rows),
            done.step,
            done.final_loss,
            approximation(self._config.loss, common_record(self._view)),
        )
        export_student(self._engine, self._tokenizer, self._folder.student, card)
        if self._curve is not None:
            self._curve.close()
            self._folder.finish(
                TrainSummary(
                    run=self._config.run,
                    world_size=self._world_size,
                    zero_stage=self._config.deepspeed.zero_stage,
                    steps=done.step,
                    tokens=done.tokens,
                    labels=done.labels,
                    resumed_from_step=self._resumed_from,
                    final_loss=done.final_loss,
                    seconds=time.perf_counter() - self._started,
                    tokens_per_s=_ratio(here["tokens"], here["seconds"]),
                    data_wait_share=_ratio(here["wait_s"], here["seconds"]),
                    rows_dropped=self._rows.num_dropped,
                    view_hash=self._view.view_hash,
                    label_sets=self._label_sets,
                    exported=str(self._folder.student),
                )
            )
        dist.barrier()

    def _resume(self) -> TrainProgress:
        """Brings back the newest good checkpoint; the start of the run where there is none."""
        folder, manifest, passed_over = find_checkpoint(self._folder.checkpoints)
        for line in passed_over:
            self._note(line)
        if folder is None or manifest is None:
            return TrainProgress(
                step=0,
                loader=LoaderState(
                    view_hash=self._view.view_hash, seed=self._config.data.seed, epoch=0, step=0
                ),
                tokens=0,
                labels=0,
                final_loss=0.0,
                pending=dict.fromkeys(SUMS, 0.0),
            )
        load_checkpoint(self._engine, folder, manifest)
        self._note(f"going on from step {manifest.progress.step} of {self._job.num_steps}")
        return manifest.progress

    def _open_curve(self) -> Curve | None:
        """The learning curve, on rank 0."""
        if self._rank != 0:
            return None
        tensorboard = self._folder.tensorboard if self._config.log.tensorboard else None
        return Curve(self._folder.metrics, tensorboard, self._progress.step)

    def _point(self) -> Point:
        sums = self._progress.pending
        return Point(
            step=self._progress.step,
            tokens=self._progress.tokens,
            loss=_ratio(sums["loss"], sums["weight"]),
            ce=_ratio(sums["ce"], sums["weight"]),
            kl=_ratio(sums["kl"], sums["weight"]),
            lr=self._lr(self._progress.step - 1),
            grad_norm=self._grad_norm,
            tokens_per_s=_ratio(sums["tokens"], sums["seconds"]),
            data_wait_share=_ratio(sums["wait_s"], sums["seconds"]),
        )

    def _post(self) -> None:
        """Tells the person who waits how far the run is."""
        now = time.perf_counter()
        is_last = self._progress.step == self._job.num_steps
        if self._rank != 0 or (now - self._posted_at < PROGRESS_EVERY_S and not is_last):
            return
        self._posted_at = now
        point = self._point()
        steps_here = self._progress.step - self._resumed_from
        remaining = self._job.num_steps - self._progress.step
        progress = Progress(
            step=point.step,
            num_steps=self._job.num_steps,
            loss=point.loss,
            tokens_per_s=point.tokens_per_s,
            data_wait_share=point.data_wait_share,
            seconds_left=self._here["seconds"] / steps_here * remaining,
        )
        self._job.board.progress.remote(progress)

    def _note(self, text: str) -> None:
        if self._rank == 0:
            self._job.board.note.remote(text)

    def _lr(self, step: int) -> float:
        factor = lr_factor(self._config.schedule, step, self._job.num_steps)
        return self._config.optimizer.lr * factor

    def _set_learning_rate(self, lr: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr

    def _sum_over_ranks(self, values: list[float] | torch.Tensor) -> list[float]:
        total = torch.as_tensor(values, dtype=torch.float64, device=self._engine.device)
        dist.all_reduce(total)
        return total.tolist()


def _open_view(job: TrainJob) -> View:
    """The view, which must be the one that the driver planned with.

    Raises:
        ConfigError: it is another one by now.
    """
    view = View.open(job.config.view)
    if view.view_hash != job.view_hash:
        raise ConfigError(
            f"view {job.config.view} has hash {view.view_hash} here, {job.view_hash} where the run "
            "was started; it was replaced meanwhile, or is not on storage that all workers share"
        )
    return view


def _check_finite(what: str, value: float, step: int) -> None:
    if not abs(value) < float("inf"):
        raise StudentError(
            f"the {what} of step {step} is {value}, so training has diverged; the checkpoints "
            "before it are good. Lower optimizer.lr, lengthen the warm-up or clip harder "
            "(deepspeed.gradient_clipping)"
        )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
