"""A view as a `torch.utils.data` dataset: packed batches in the trainer's order, for any loop.

    dataset = ViewDataset("runs/demo/views/train", data, loss, vocab_size, tokenizer)
    for batch in DataLoader(dataset, batch_size=None):
        loss_sum, parts = student(batch["input_ids"], batch["position_ids"], batch["targets"], loss)
        (loss_sum / batch["step_weight"]).backward()

An item is one micro-batch, ready for one forward pass, so the `DataLoader` takes
``batch_size=None``. What is read when follows from the view, ``data`` and the seed alone
(`trainer.data.row_order`): it is what `tutelage train` would read. An iteration is the whole run,
all of ``data.epochs`` or ``data.steps``, from where ``load_state_dict`` put its start.

**Exact token means.** ``step_weight`` is the weight of all labels of the global step, over all its
micro-batches and ranks, known from the view without asking other ranks. Losses divided by it and
summed over micro-batches and ranks are the mean over the step's labels; where a data-parallel
wrapper averages over W ranks, multiply by W.

**Worker processes.** With ``num_workers`` n, worker w reads every n-th batch from the w-th on, and
the `DataLoader` puts them together in the same order as with none. Each decodes the row groups that
it needs for itself, so more than one or two pay only where reading is slow.
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
    read_row_table,
    run_steps,
)
from trainer.losses.compatibility import check_loss
from trainer.losses.targets import SparseTargets
from trainer.student.vocabulary import check_vocabularies


class ViewBatch(TypedDict):
    """One micro-batch: B packed sequences of L tokens, padding included.

    Attributes:
        input_ids: int64 [B, L].
        position_ids: int64 [B, L], restarting at 0 where a document starts.
        targets: its labels; `SparseTargets.to` moves them to a device.
        step_weight: sum of the weights of all labels of the global step that it belongs to.
        state: for `ViewDataset.load_state_dict`, to go on after this batch.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: SparseTargets
    step_weight: float
    state: dict[str, Any]


class _State(StrictModel):
    """Where an iteration stands.

    Attributes:
        loader: after the last global step that is done.
        step: global steps done, of all epochs.
        micro_batch: micro-batches done of the step after that.
        world_size: ranks that it was saved with.
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
            data: how rows become steps. ``prefetch_steps`` is not used: worker processes prefetch.
            loss: says which columns are read; the losses taken of the batches must need no others.
            vocab_size: rows of the student's lm_head.
            tokenizer: the student's, compared with that of the labels; None to vouch for it.
            rank: of this process among ``world_size``.

        Raises:
            ConfigError: the labels cannot serve the loss, rows do not fit, or there is no such
                rank.
            VocabularyError: the student reads other tokens from the labels' ids.
            StoreError, DamagedError: the view or its shards are not what they should be.
        """
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank = {rank} of world_size = {world_size}: there is no such rank")
        self._url, self._data, self._loss, self._vocab_size = view, data, loss, vocab_size
        self._rank, self._world_size = rank, world_size
        self._view = View.open(view)
        self._view.check_shards()
        check_loss(loss, common_record(self._view))
        if tokenizer is not None:
            for label_set in self._view.label_sets:
                check_vocabularies(tokenizer, vocab_size, label_set)
        self._rows = read_row_table(self._view, data)
        self._start = self._done = _State(
            loader=LoaderState(view_hash=self._view.view_hash, seed=data.seed, epoch=0, step=0),
            step=0,
            micro_batch=0,
            world_size=world_size,
        )
        # In shared memory: worker processes are copies of this object, and say so here.
        self._elsewhere = torch.zeros(1, dtype=torch.bool).share_memory_()

    @property
    def micro_batches_per_step(self) -> int:
        """Items of every global step, on every rank: gradient accumulation steps."""
        return num_micro_batches(self._data, self._world_size)

    def num_steps(self) -> int:
        """Global steps of the whole run. Plans every epoch once where epochs were asked for."""
        return count_steps(self._rows, self._data)

    def __iter__(self) -> Iterator[ViewBatch]:
        worker = get_worker_info()
        if worker is None:
            for batch, state in self._batches(self._view, 0, 1):
                self._done = state
                yield batch
            return
        self._elsewhere.fill_(True)
        for batch, _ in self._batches(View.open(self._url), worker.id, worker.num_workers):
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the latest iteration stands: after the batch that it gave last.

        Raises:
            ConfigError: worker processes gave the batches. They read ahead of the training, so only
                a batch knows where that is: keep ``batch["state"]``.
        """
        if bool(self._elsewhere):
            raise ConfigError(
                "state_dict() of a dataset that worker processes read: they are ahead of the "
                'training; keep batch["state"] of the last batch that was trained on instead'
            )
        return self._done.model_dump()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes every later iteration start there: a `state_dict` or a batch's ``state``.

        Raises:
            ConfigError: it is of another view, seed or packer, or from within a step that other
                ranks had other parts of.
        """
        found = _State.model_validate(state)
        found.loader.check_order(self._start.loader, "the state", "begin anew")
        if found.micro_batch and found.world_size != self._world_size:
            raise ConfigError(
                f"the state is from within step {found.step + 1} of a run on {found.world_size} "
                f"ranks, and there are {self._world_size} now; keep states of whole steps, those "
                'whose "micro_batch" is 0'
            )
        self._start = self._done = found.model_copy(update={"world_size": self._world_size})

    def _batches(
        self, view: View, worker: int, num_workers: int
    ) -> Iterator[tuple[ViewBatch, _State]]:
        """Every ``num_workers``-th batch of this rank from the start, and the state after it."""
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
        """Rows of this rank's micro-batches, the weight of their step, and the state after them."""
        size, per_step = self._data.micro_batch_size, self.micro_batches_per_step
        before = self._start
        for loader, packs in run_steps(self._rows, self._data, before.loader):
            if before.step == self._data.steps:
                return
            mine = packs[self._rank :: self._world_size]
            mine += [np.empty(0, np.int64)] * (per_step * size - len(mine))
            rows = np.concatenate(packs)
            weight = float(
                np.dot(self._rows.weight[rows].astype(np.float64), self._rows.num_labels[rows])
            )
            for place in range(before.micro_batch, per_step):
                after = before.model_copy(update={"micro_batch": place + 1})
                if place + 1 == per_step:
                    after = before.model_copy(
                        update={"loader": loader, "step": before.step + 1, "micro_batch": 0}
                    )
                yield mine[place * size : (place + 1) * size], weight, after
            before = after
