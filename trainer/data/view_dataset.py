"""A view as a `torch.utils.data` dataset: packed batches in the trainer's order, for custom loops.

    dataset = ViewDataset("runs/demo/views/train", data, loss, vocab_size, tokenizer)
    for batch in DataLoader(dataset, batch_size=None):
        loss_sum, parts = student(batch["input_ids"], batch["position_ids"], batch["targets"], loss)
        (loss_sum / batch["step_weight"]).backward()

An item is one micro-batch, ready for a forward pass, so pass ``batch_size=None`` to the
`DataLoader`. The order depends only on the view and ``data``, including its seed
(`trainer.data.row_order`), and equals that of `tutelage train`. One iteration covers the entire
run, ``data.epochs`` or ``data.steps``, from the start or from the state passed to
``load_state_dict``.

**Exact token means.** ``step_weight`` is the total weight of the global step's labels, over all
micro-batches and ranks, known from the view without communication. Losses divided by it and summed
over micro-batches and ranks give the mean over the step's labels; if a data-parallel wrapper
averages over W ranks, multiply by W.

**Worker processes.** With ``num_workers`` n, worker w reads every n-th batch starting at the w-th,
and the `DataLoader` merges them in single-process order. Each worker decodes its own row groups, so
more than one or two workers pay off only on slow storage.

Shapes: B packed sequences of a micro-batch, L their padded length.
"""

from collections.abc import Iterator
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from schemas.config import StrictModel
from schemas.errors import ConfigError
from schemas.views.view import View
from trainer.config.train import DataConfig, LossConfig
from trainer.data.loader import RowReader, common_record, read_micro_batch
from trainer.data.row_order import (
    Int64s,
    LoaderState,
    count_steps,
    num_micro_batches,
    rank_micro_batches,
    read_row_table,
    run_steps,
)
from trainer.losses.compatibility import check_loss
from trainer.losses.targets import SparseTargets
from trainer.student.vocabulary import check_vocabularies


class ViewBatch(TypedDict):
    """One micro-batch, on the CPU.

    Attributes:
        input_ids: int64 [B, L], padded at the end with token id 0.
        position_ids: int64 [B, L], restarting at 0 at the start of every document.
        targets: labels; `SparseTargets.to` moves them to a device.
        step_weight: total weight of the labels in its global step.
        state: for `ViewDataset.load_state_dict`, to resume after this batch.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: SparseTargets
    step_weight: float
    state: dict[str, Any]


class _State(StrictModel):
    """Position of an iteration.

    Attributes:
        loader: state after the last completed global step.
        step: completed global steps over all epochs.
        micro_batch: completed micro-batches of the next step.
        world_size: number of ranks.
    """

    loader: LoaderState
    step: int
    micro_batch: int
    world_size: int


class ViewDataset(IterableDataset[ViewBatch]):
    """The micro-batches of one rank, in the order of the run."""

    def __init__(
        self,
        view: str,
        data: DataConfig,
        loss: LossConfig,
        vocab_size: int,
        tokenizer: Any,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """
        Args:
            view: URL of the view.
            data: how rows become steps. ``prefetch_steps`` is ignored: worker processes prefetch.
            loss: decides which columns are read; losses computed on the batches must not need more.
            vocab_size: rows of the student's lm_head.
            tokenizer: the student's, compared with the labels' vocabulary; None skips the check.
            rank: rank of this process among ``world_size``.
            world_size: number of data-parallel processes.

        Raises:
            ConfigError: the labels cannot serve the loss, rows do not fit, or the rank is out of
                range.
            VocabularyError: the student maps the labels' ids to other tokens.
            StoreError, DamagedError: the view or one of its shards is missing or damaged.
        """
        if not 0 <= rank < world_size:
            raise ConfigError(
                f"rank = {rank} with world_size = {world_size}: expected 0 to {world_size - 1}"
            )
        self._url, self._data, self._loss, self._vocab_size = view, data, loss, vocab_size
        self._rank, self._world_size = rank, world_size
        self._view = View.open(view)
        self._view.check_shards()
        check_loss(loss, common_record(self._view))
        if tokenizer is not None:
            for label_set in self._view.label_sets:
                check_vocabularies(tokenizer.get_vocab(), vocab_size, label_set.vocabulary())
        self._rows = read_row_table(self._view, data)
        self._start = self._done = _State(
            loader=LoaderState(view_hash=self._view.view_hash, seed=data.seed, epoch=0, step=0),
            step=0,
            micro_batch=0,
            world_size=world_size,
        )
        # Worker processes iterate copies of this object, and then its own position is meaningless.
        # A flag in shared memory makes this visible here.
        self._read_by_workers = torch.zeros(1, dtype=torch.bool).share_memory_()

    @property
    def micro_batches_per_step(self) -> int:
        """Items per global step on every rank: gradient accumulation steps."""
        return num_micro_batches(self._data, self._world_size)

    def num_steps(self) -> int:
        """Counts the global steps of the run; plans every epoch if ``data.epochs`` is set."""
        return count_steps(self._rows, self._data)

    def __iter__(self) -> Iterator[ViewBatch]:
        worker = get_worker_info()
        if worker is None:
            for batch, state in self._batches(self._view, 0, 1):
                self._done = state
                yield batch
            return
        self._read_by_workers.fill_(True)
        for batch, _ in self._batches(View.open(self._url), worker.id, worker.num_workers):
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Returns the position of the latest iteration, after the last batch it yielded.

        Raises:
            ConfigError: worker processes read the batches ahead of training; keep
                ``batch["state"]`` instead.
        """
        if bool(self._read_by_workers):
            raise ConfigError(
                "state_dict() is undefined while worker processes read ahead of training; "
                'keep batch["state"] of the last batch trained on instead'
            )
        return self._done.model_dump()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes later iterations resume after a `state_dict` or a batch's ``state``.

        Raises:
            ConfigError: the state belongs to another view, seed or packer version, or lies within a
                step of a run on another number of ranks.
        """
        found = _State.model_validate(state)
        found.loader.check_order(self._start.loader, "the state", "start over")
        if found.micro_batch and found.world_size != self._world_size:
            raise ConfigError(
                f"the state lies within step {found.step + 1} of a run with world_size = "
                f"{found.world_size}, but here it is {self._world_size}; resume from a state at "
                'the end of a step, whose "micro_batch" is 0'
            )
        self._start = self._done = found.model_copy(update={"world_size": self._world_size})

    def _batches(
        self, view: View, worker: int, num_workers: int
    ) -> Iterator[tuple[ViewBatch, _State]]:
        """Yields every ``num_workers``-th batch of this rank and the state after it."""
        reader = RowReader(view, self._rows, self._loss, self._data.cache_bytes)
        try:
            for number, (packs, weight, state) in enumerate(self._plan()):
                if number % num_workers != worker:
                    continue
                read = read_micro_batch(reader, packs, self._data, self._vocab_size)
                batch = ViewBatch(
                    input_ids=read.input_ids,
                    position_ids=read.position_ids,
                    targets=read.targets,
                    step_weight=weight,
                    state=state.model_dump(),
                )
                yield batch, state
        finally:
            reader.close()

    def _plan(self) -> Iterator[tuple[list[Int64s], float, _State]]:
        """Yields each micro-batch's packs, its step's weight, and the state after it."""
        before = self._start
        for loader, packs in run_steps(self._rows, self._data, before.loader):
            if before.step == self._data.steps:
                return
            mine = rank_micro_batches(packs, self._data, self._rank, self._world_size)
            rows = np.concatenate(packs)
            weight = float(
                np.dot(self._rows.weight[rows].astype(np.float64), self._rows.num_labels[rows])
            )
            for done in range(before.micro_batch + 1, len(mine) + 1):
                after = before.model_copy(update={"micro_batch": done})
                if done == len(mine):
                    after = before.model_copy(
                        update={"loader": loader, "step": before.step + 1, "micro_batch": 0}
                    )
                yield mine[done - 1], weight, after
            before = after
