"""Trains on one rank: restore, training loop, checkpoints, export.

Independent of Ray: needs only a default process group and a `RunStatus`.
"""

import contextlib
import os
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from schemas.errors import ConfigError, TutelageError
from trainer.checkpoints.restore import load_checkpoint
from trainer.checkpoints.store import (
    FOLDER,
    CheckpointManifest,
    checkpoint_name,
    local_checkpoint,
)
from trainer.checkpoints.train_progress import TrainProgress
from trainer.checkpoints.writer import CheckpointWriter
from trainer.config.train import TrainConfig
from trainer.data.loader import Loader, common_record
from trainer.data.mixture import TrainingView, open_view
from trainer.data.row_order import LoaderState, read_row_table
from trainer.engine.collectives import from_rank_0
from trainer.engine.deepspeed_engine import build_engine, prepare_process
from trainer.engine.export import export_student, model_card
from trainer.engine.guards import BadStep, Guard
from trainer.engine.learning_rate import LearningRate
from trainer.engine.train_step import TrainStep
from trainer.evaluation.held_out import HeldOut
from trainer.losses.compatibility import approximation
from trainer.run.bad_batch import BadBatchReport
from trainer.run_folder import RunFolder, TrainSummary
from trainer.student.build import StudentWithHead, build_student
from trainer.student.lora import base_digest, check_base
from trainer.tracking.learning_curve import LearningCurve
from trainer.tracking.reporter import Reporter, no_sums, ratio
from trainer.tracking.run_status import RunStatus
from trainer.tracking.step_lines import RowLog


@dataclass(frozen=True)
class TrainJob:
    """The arguments of every worker.

    Attributes:
        folder: the driver's working directory, the base of relative paths.
        owner: from ``RunFolder.claim``.
        view_hash: hash of the view that the driver opened.
        num_steps: global steps of the run.
        status: receives progress, notes and errors.
    """

    config: TrainConfig
    folder: str
    owner: str
    view_hash: str
    num_steps: int
    status: RunStatus


def train_worker(job: TrainJob) -> None:
    """Trains, or resumes training, to the end of the run. Runs on every rank.

    Requires ``LOCAL_RANK``, the index of the rank on its node.
    """
    # Ray Train restarts the workers after any failure. An error that the user has to fix would
    # recur, so it stays in the status and ends later attempts immediately.
    if job.status.error() is not None:
        return
    with contextlib.suppress(OSError):  # the folder may be missing here; absolute paths still work
        os.chdir(job.folder)
    try:
        Worker(job).run()
    except TutelageError as error:
        job.status.fail(error)
        raise


class Worker:
    """The state of one rank."""

    def __init__(self, job: TrainJob) -> None:
        self._started = time.perf_counter()
        self._job, self._config = job, job.config
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        prepare_process(self._config)
        self._folder = RunFolder(self._config.run)
        self._check_owner()
        self._view = _open_view(job)
        self._label_sets = [label_set.fingerprint for label_set in self._view.label_sets]
        self._rows = read_row_table(self._view, self._config.data)
        model, self._tokenizer = build_student(self._config.student)
        self._vocab_size = model.get_output_embeddings().weight.shape[0]
        self._base_digest = base_digest(model)  # before ZeRO-3 splits the weights
        student = StudentWithHead(model, self._config.deepspeed.gradient_checkpointing)
        self._engine = build_engine(student, self._config)
        self._attempt = from_rank_0(uuid.uuid4().hex[:8])
        self._last_checkpoint = ""
        self._progress = self._resume()
        self._resumed_from = self._progress.step
        store = self._folder.store
        self._writer = CheckpointWriter(store, self._attempt, self._config, self._check_owner)
        self._lr = LearningRate(self._config, job.num_steps)
        self._guard = Guard(self._config.guard, self._progress.recent)
        self._step = TrainStep(self._engine, self._config, self._guard)
        self._bad_batch = BadBatchReport(
            self._config, self._view, self._rows, self._step, self._vocab_size
        )
        self._held_out = (
            HeldOut(self._config, self._step, self._vocab_size) if self._config.eval else None
        )
        self._reporter = self._make_reporter()

    def run(self) -> None:
        """Trains to the last step, exports the student, and writes the summary."""
        loader = Loader(
            self._config,
            self._view,
            self._rows,
            self._progress.loader,
            self._rank,
            self._vocab_size,
            self._world_size,
        )
        with contextlib.closing(loader):
            while not self._is_over:
                self._advance(loader)
                self._save()
            self._writer.wait()
        self._finish()

    def _advance(self, loader: Loader) -> None:
        """Runs one step, reports it, and evaluates if an evaluation is due."""
        before = time.perf_counter()
        batch = next(loader)
        step = self._progress.step + 1
        try:
            result = self._step.run(batch, step, self._lr(step))
        except BadStep as bad:
            self._check_owner()
            self._writer.wait()  # the error message names the last checkpoint: complete it first
            checkpoint, store = self._last_checkpoint, self._folder.store
            raise self._bad_batch.write(store, bad, batch, checkpoint) from None
        seconds = time.perf_counter() - before
        self._progress = self._reporter.add(self._progress, batch, result, seconds, loader.wait_s)
        self._reporter.send_status(self._progress)
        self._evaluate()
        if step % self._config.log.every_steps == 0 or self._is_over:
            self._check_owner()
            self._progress = self._reporter.add_point(
                self._progress, self._lr(step), result.grad_norm
            )

    @property
    def _is_over(self) -> bool:
        """Whether the last step is done or early stopping ended the run."""
        is_early = self._progress.evaluation.is_over(self._config.eval)
        return is_early or self._progress.step >= self._job.num_steps

    def _check_owner(self) -> None:
        """Raises if another process has taken over the run folder; called before every write."""
        self._folder.check_owner(self._job.owner)

    def _evaluate(self) -> None:
        """Measures the student on the held-out rows if an evaluation is due."""
        step, config = self._progress.step, self._config.eval
        if self._held_out is None or config is None:
            return
        if step % config.every_steps and step != self._job.num_steps:
            return
        point = self._held_out.measure(step)
        self._check_owner()
        self._progress = self._reporter.add_evaluation(self._progress, point, config)
        if self._is_over and step < self._job.num_steps:
            best = self._progress.evaluation
            self._note(
                f"stopping early: eval.{config.metric} was lowest, {best.best:.4f}, at step "
                f"{best.best_step}, {best.without_improvement} evaluations ago"
            )

    def _save(self) -> None:
        """Saves a checkpoint if one is due; raises the error of the last save."""
        self._writer.check()
        step, every = self._progress.step, self._config.checkpoint.every_steps
        if step % every and not self._is_over:
            return
        self._check_owner()
        # Lines must be durable before the checkpoint, because a resumed run continues after them.
        self._reporter.flush()
        progress = self._progress.model_copy(update={"recent": self._guard.recent})
        self._writer.save(self._engine, progress, self._label_sets)
        name = checkpoint_name(step, self._attempt)
        self._last_checkpoint = self._folder.store.path(FOLDER, name)

    def _finish(self) -> None:
        done = self._progress
        self._check_owner()
        card = model_card(
            self._config,
            self._label_sets,
            self._view.view_hash,
            len(self._rows),
            done.step,
            done.final_loss,
            approximation(self._config.loss, common_record(self._view)),
        )
        export_student(self._engine, self._tokenizer, self._folder.store, card)
        self._reporter.close()
        if self._rank == 0:
            self._folder.finish(self._summary())
        dist.barrier()  # no rank returns before the summary exists

    def _summary(self) -> TrainSummary:
        done = self._progress
        return TrainSummary(
            run=self._config.run,
            world_size=self._world_size,
            zero_stage=self._config.deepspeed.zero_stage,
            steps=done.step,
            tokens=done.tokens,
            labels=done.labels,
            stopped_early=done.step < self._job.num_steps,
            best_eval=done.evaluation.best,
            best_eval_step=done.evaluation.best_step,
            resumed_from_step=self._resumed_from,
            final_loss=done.final_loss,
            seconds=time.perf_counter() - self._started,
            tokens_per_s=self._reporter.tokens_per_s,
            data_wait_share=self._reporter.data_wait_share,
            checkpoint_wait_share=ratio(
                self._writer.blocked_s, self._writer.blocked_s + self._reporter.seconds
            ),
            checkpoint_hidden_share=self._writer.hidden_share,
            rows_dropped=self._rows.num_dropped,
            view_hash=self._view.view_hash,
            label_sets=self._label_sets,
            exported=self._folder.student,
        )

    def _resume(self) -> TrainProgress:
        """Loads the newest valid checkpoint, or starts at step 0 if none exists."""
        store = self._folder.store
        is_node_leader = os.environ["LOCAL_RANK"] == "0"
        cache = Path(tempfile.gettempdir(), f"tutelage-{self._attempt}")
        with local_checkpoint(store, cache, is_node_leader) as (folder, manifest, skipped):
            for line in skipped:
                self._note(line)
            if folder is None or manifest is None:
                return self._initial_progress()
            is_leader = self._rank == 0 if store.is_local else is_node_leader
            self._load(folder, manifest, is_leader)
        saved_by, now = manifest.world_size, self._world_size
        workers = "worker" if now == 1 else "workers"
        moved = f", now on {now} {workers} instead of {saved_by}" if now != saved_by else ""
        self._note(f"resuming from step {manifest.progress.step} of {self._job.num_steps}{moved}")
        return manifest.progress

    def _initial_progress(self) -> TrainProgress:
        return TrainProgress(
            step=0,
            loader=LoaderState(
                view_hash=self._view.view_hash, seed=self._config.data.seed, epoch=0, step=0
            ),
            tokens=0,
            labels=0,
            final_loss=0.0,
            pending=no_sums(),
            base_digest=self._base_digest,
        )

    def _load(self, folder: Path, manifest: CheckpointManifest, is_leader: bool) -> None:
        """Loads a checkpoint; refuses it if row order or frozen weights differ from this run's."""
        self._last_checkpoint = self._folder.store.path(FOLDER, folder.name)
        manifest.progress.loader.check_order(
            self._initial_progress().loader,
            f"checkpoint {self._last_checkpoint}",
            "choose a new run folder: run=...",
        )
        check_base(self._config.student, self._base_digest, manifest.progress.base_digest)
        load_checkpoint(self._engine, folder, manifest, is_leader)

    def _make_reporter(self) -> Reporter:
        """Creates the reporter; only rank 0 opens files."""
        curve = row_log = None
        if self._rank == 0:
            store, done = self._folder.store, self._progress.step
            curve = LearningCurve(store, self._config, done)
            if self._config.log.rows:
                row_log = RowLog(store, self._view, self._config.data, done)
        return Reporter(self._job.status, curve, row_log, self._job.num_steps)

    def _note(self, text: str) -> None:
        if self._rank == 0:
            self._job.status.note(text)


def _open_view(job: TrainJob) -> TrainingView:
    """Opens the job's view.

    Raises:
        ConfigError: its content differs from the view that the driver opened.
    """
    view = open_view(job.config.view)
    if view.view_hash != job.view_hash:
        raise ConfigError(
            f"view {view.url} has hash {view.view_hash} here, {job.view_hash} on the driver; it "
            "was replaced since the start, or is not on storage that all workers share: start "
            "the run again"
        )
    return view
