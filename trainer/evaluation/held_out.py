"""Measures the student on held-out rows during training."""

import contextlib
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from schemas.errors import ConfigError
from schemas.views.view import View
from trainer.config.train import LossConfig, TrainConfig
from trainer.data.loader import Loader, common_record
from trainer.data.row_order import LoaderState, RowTable, count_steps, read_row_table
from trainer.engine.train_step import TrainStep
from trainer.tracking.learning_curve import EvalPoint


class HeldOut:
    """Evaluates the student on the held-out rows. Collective."""

    def __init__(self, config: TrainConfig, step: TrainStep, vocab_size: int) -> None:
        """
        Args:
            config: must have ``eval``.
            step: runs the student.
            vocab_size: rows of the student's output head.

        Raises:
            ConfigError: the metric needs a teacher's labels but the view has none, or no row fits.
        """
        assert config.eval is not None
        self._step, self._vocab_size = step, vocab_size
        self._view = View.open(config.eval.view)
        loss = eval_loss(self._view, config)
        self._has_teacher = loss.kind != "hard"
        # Packed into lanes as in training, so sums do not depend on the number of workers.
        data = config.data.model_copy(
            update={"epochs": 1, "steps": None, "long_rows": "drop", "seed": 0}
        )
        self._rows = spread_rows(read_row_table(self._view, data), config.eval.max_rows)
        self._config = config.model_copy(update={"loss": loss, "data": data})
        self._num_batches = count_steps(self._rows, data)

    def measure(self, step: int) -> EvalPoint:
        """Measures the student after ``step`` steps, without changing it."""
        before = time.perf_counter()
        # Always start at the first row, so that every evaluation measures the same rows.
        start = LoaderState(view_hash=self._view.view_hash, seed=0, epoch=0, step=0)
        loader = Loader(
            self._config,
            self._view,
            self._rows,
            start,
            dist.get_rank(),
            self._vocab_size,
            dist.get_world_size(),
        )
        with contextlib.closing(loader):
            ce, kl, weight = self._sums(loader)
        return EvalPoint(
            step=step,
            ce=ce / weight,
            kl=kl / weight if self._has_teacher else None,
            labels=int(self._rows.num_labels.sum()),
            seconds=round(time.perf_counter() - before, 3),
        )

    def _sums(self, loader: Loader) -> list[float]:
        """CE, KL and weight, summed over all labels and ranks."""
        total = torch.zeros(3, dtype=torch.float64)
        with torch.no_grad(), self._step.without_dropout():
            for _ in range(self._num_batches):
                for micro_batch in next(loader).micro_batches:
                    _, parts = self._step.forward(micro_batch, self._config.loss)
                    sums = torch.stack([parts["ce"], parts["kl"], parts["weight"]])
                    total += sums.double().cpu()
        return self._step.sum_over_ranks(total)


def eval_loss(view: View, config: TrainConfig) -> LossConfig:
    """The loss to evaluate: the ghost objective, a lower bound of the KL for all kinds of labels.

    Raises:
        ConfigError: the KL to the teacher is requested but the labels are tokens only.
    """
    assert config.eval is not None
    has_teacher = common_record(view).kind != "tokens"
    need_kl = {
        "eval.metric": config.eval.metric == "kl",
        "checkpoint.best_metric": config.checkpoint.best_metric == "eval_kl",
    }
    if not has_teacher and any(need_kl.values()):
        keys = " and ".join(key for key, needed in need_kl.items() if needed)
        raise ConfigError(
            f"the KL to a teacher is requested by {keys}, but the labels of {view.url} are tokens "
            "only; choose the cross-entropy, or evaluate on a view with a teacher's labels"
        )
    sizes: dict[str, Any] = {
        name: getattr(config.loss, name) for name in ("chunk_tokens", "head_memory_bytes")
    }
    return LossConfig(kind="ghost" if has_teacher else "hard", **sizes)


def spread_rows(rows: RowTable, max_rows: int) -> RowTable:
    """At most ``max_rows`` rows, spread evenly over the table; 0: all of them."""
    if not max_rows or max_rows >= len(rows):
        return rows
    kept = np.arange(max_rows) * len(rows) // max_rows
    names = ("num_tokens", "num_labels", "weight", "group", "row")
    return replace(
        rows,
        **{name: getattr(rows, name)[kept] for name in names},
        order_key=f"{rows.order_key} {max_rows}",
    )
