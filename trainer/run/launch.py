"""Launches a training run: runs all fast checks first, then hands over to Ray Train.

Configuration, view, shards, vocabulary and run folder are checked before contacting any cluster.
"""

from collections.abc import Callable
from typing import Any

from schemas.console.progress import Progress
from schemas.errors import StudentError, first_line
from schemas.views.view import View
from trainer.config.student import StudentConfig
from trainer.config.train import RayConfig, TrainConfig
from trainer.data.mixture import TrainingView, open_view
from trainer.data.row_order import count_steps, read_row_table
from trainer.engine.deepspeed_config import build_deepspeed_config
from trainer.run.ray_train import train_on_ray
from trainer.run_folder import RunFolder, TrainSummary
from trainer.tracking.external import check_trackers

TrainWorkers = Callable[[TrainConfig, RunFolder, str, int, Progress], None]
"""Runs all workers to completion: (config, folder, view hash, number of steps, progress)."""


def run_train_job(
    config: TrainConfig, progress: bool = True, train_workers: TrainWorkers | None = None
) -> TrainSummary:
    """Trains the configured student; resumes an interrupted run.

    Args:
        config: the run.
        progress: show progress on standard error.
        train_workers: runs ``train_worker`` on every rank to completion; None: Ray Train.

    Returns:
        The summary, immediately if the run is already finished.

    Raises:
        TutelageError: the run cannot start or has failed; the message names cause and remedy.
    """
    console = Progress("train", enabled=progress)
    # Called only for its errors: contradictory configuration fails before any I/O.
    build_deepspeed_config(config, num_parameters=1, world_size=config.ray.max_workers)
    check_trackers(config.log)
    view = open_view(config.view)
    folder = RunFolder(config.run)
    label_sets = [label_set.fingerprint for label_set in view.label_sets]
    # Before the shards are checked: a finished run needs neither them nor a cluster.
    finished = folder.finished(config, view.view_hash, label_sets)
    if finished is not None:
        console.say(
            f"{config.run} is already finished: {finished.steps} steps, {finished.exported}"
        )
        return finished
    view.check_shards()
    note = _check_labels(config, view)
    if note:
        console.say(note)
    rows = read_row_table(view, config.data)
    num_steps = count_steps(rows, config.data)
    console.say(
        f"{len(rows):,} rows, {int(rows.num_tokens.sum()):,} tokens, {num_steps:,} steps of "
        f"{config.data.sequences_per_step} x {config.data.max_tokens} tokens on "
        f"{_workers(config.ray)}"
        + (f"; {rows.num_dropped:,} longer rows are dropped" if rows.num_dropped else ""),
    )
    # After all checks, so that a refused run writes nothing.
    folder.start(config, view.view_hash, label_sets)
    (train_workers or train_on_ray)(config, folder, view.view_hash, num_steps, console)
    summary = folder.summary()
    if summary is None:
        raise StudentError(f"the run in {config.run} ended without a summary; run it again")
    console.say(_outcome(config, summary))
    return summary


def _outcome(config: TrainConfig, summary: TrainSummary) -> str:
    """The last line of a finished run."""
    steps = f"{summary.steps} steps" + (", stopped early" if summary.stopped_early else "")
    loss = f"loss {summary.final_loss:.4f}"
    if config.eval is not None and summary.best_eval is not None:
        best = f"{summary.best_eval:.4f} at step {summary.best_eval_step}"
        loss += f", lowest held-out {config.eval.metric} {best}"
    return f"trained {steps}, {loss}: {summary.exported}"


def _check_labels(config: TrainConfig, view: TrainingView) -> str:
    """Refuses labels that the student or the loss cannot use.

    Returns:
        A note on how the loss is approximated; empty if it is exact.
    """
    from trainer.data.loader import common_record
    from trainer.evaluation.held_out import eval_loss
    from trainer.losses.compatibility import approximation, check_loss
    from trainer.student.build import load_tokenizer
    from trainer.student.vocabulary import check_vocabularies

    record = common_record(view)
    check_loss(config.loss, record)
    tokenizer = load_tokenizer(config.student.tokenizer or config.student.path)
    vocab_size = _vocab_size(config.student, tokenizer)
    views = [view]
    if config.eval is not None:
        held_out = View.open(config.eval.view)
        held_out.check_shards()
        eval_loss(held_out, config)
        views.append(held_out)
    for label_set in [label_set for view in views for label_set in view.label_sets]:
        check_vocabularies(tokenizer.get_vocab(), vocab_size, label_set.vocabulary())
    return approximation(config.loss, record)


def _vocab_size(student: StudentConfig, tokenizer: Any) -> int:
    """Rows of the student's output head, without loading its weights."""
    if not student.path:
        given = student.config.get("vocab_size")
        return int(given) if given is not None else 1 + max(tokenizer.get_vocab().values())
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(student.path)
    except (OSError, ValueError) as error:
        raise StudentError(
            f"student.path = {student.path} cannot be used: {first_line(error)}"
        ) from error
    return int(config.get_text_config().vocab_size)


def _workers(ray: RayConfig) -> str:
    if ray.max_workers == 1:
        return "1 worker"
    if ray.min_workers == ray.max_workers:
        return f"{ray.max_workers} workers"
    return f"{ray.min_workers} to {ray.max_workers} workers"
