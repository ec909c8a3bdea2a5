"""Prefetches the rows of every global step as packed tensors.

`trainer.data.row_order` decides which rows are read when; the loader adds no order and no state of
its own. One thread per worker plans, reads row groups, gathers rows and builds tensors, a bounded
number of steps ahead. Decoded row groups are cached up to ``data.cache_bytes``, since consecutive
packs of a lane come from the same window.

Shapes: B packed sequences of a micro-batch, L their padded length, R rows.
"""

import functools
import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.errors import ConfigError, StudentError
from schemas.label_set.shards import read_row_group
from schemas.record import LabelRows, arrow_schema
from schemas.record.reduce import reduce_rows
from schemas.record.spans import concatenated_ranges
from schemas.spec import RecordSpec
from trainer.config.train import DataConfig, LossConfig, TrainConfig
from trainer.data.mixture import TrainingView
from trainer.data.row_order import Int64s, LoaderState, RowTable, rank_micro_batches, run_steps
from trainer.losses.targets import SparseTargets, build_targets

PAD_MULTIPLE = 64
"""Sequences are padded to a multiple of this, which limits the number of distinct shapes."""

DECAY_MS = 10_000
"""Delay before Arrow returns freed memory to the system; see `keep_freed_pages`."""

TEXT_COLUMNS = ("row_key", "content_key", "token_ids", "label_spans")
TEACHER_COLUMNS = (
    "head_len",
    "tail_len",
    "entry_ids",
    "entry_logprobs",
    "entry_counts",
    "tail_logmass",
    "lse",
)
"""Columns that losses use, besides TEXT_COLUMNS; all others are never decoded."""


@dataclass(frozen=True)
class MicroBatch:
    """Input of one forward pass, on the CPU.

    Attributes:
        input_ids: int64 [B, L], packed rows, padded at the end with token id 0.
        position_ids: int64 [B, L], restarting at 0 in every row; padding counts as a row.
        targets: labels; their positions index the flattened [B * L] tokens.
        weight: total weight of the labelled positions.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: SparseTargets
    weight: float


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of a global step.

    Attributes:
        state: loader state after this step.
        micro_batches: the same number on every rank, padded with empty ones of weight 0.
        packs: row ids of each lane, over all ranks; rank r of W has the lanes r mod W.
        num_tokens: tokens of the step, over all ranks, without padding.
        num_labels: labelled positions of the step, over all ranks.
    """

    state: LoaderState
    micro_batches: list[MicroBatch]
    packs: list[Int64s]
    num_tokens: int
    num_labels: int


class Loader:
    """One rank's batches, prefetched by a thread. Call ``next`` for every step, then ``close``.

    Attributes:
        wait_s: seconds that the latest ``next`` waited for data.
    """

    def __init__(
        self,
        config: TrainConfig,
        view: TrainingView,
        rows: RowTable,
        start: LoaderState,
        rank: int,
        vocab_size: int,
        world_size: int = 1,
    ) -> None:
        """
        Args:
            config: the run's configuration.
            view: the view to train on.
            rows: the view's rows, from `read_row_table`.
            start: state after the last completed step.
            rank: rank of this worker among ``world_size``.
            vocab_size: rows of the student's output head.
        """
        self.wait_s = 0.0
        self._config, self._rows, self._start = config, rows, start
        self._rank, self._world_size = rank, world_size
        self._reader = RowReader(view, rows, config.loss, config.data.cache_bytes)
        self._vocab_size = vocab_size
        self._ready: queue.Queue[StepBatch | BaseException] = queue.Queue(
            config.data.prefetch_steps
        )
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._thread.start()

    def __next__(self) -> StepBatch:
        """Returns the batch of the next step.

        Raises:
            TutelageError: the error that ended the reading thread, such as a damaged shard.
        """
        before = time.perf_counter()
        batch = self._ready.get()
        self.wait_s = time.perf_counter() - before
        if isinstance(batch, BaseException):
            raise batch
        return batch

    def close(self) -> None:
        """Stops the thread."""
        self._stopped.set()
        while self._thread.is_alive():
            try:
                self._ready.get_nowait()  # the thread may be blocked on a full queue
            except queue.Empty:
                self._thread.join(0.01)
        self._reader.close()

    def _run(self) -> None:
        try:
            for state, packs in run_steps(self._rows, self._config.data, self._start):
                self._ready.put(self._load(state, packs))
                if self._stopped.is_set():
                    return
            self._ready.put(StudentError("the loader has no steps beyond its last epoch"))
        except BaseException as error:  # noqa: BLE001  (raised again in the training thread)
            self._ready.put(error)

    def _load(self, state: LoaderState, packs: list[Int64s]) -> StepBatch:
        data = self._config.data
        mine = rank_micro_batches(packs, data, self._rank, self._world_size)
        # Start reading for all micro-batches at once, so that decoding overlaps with gathering.
        for packs_of_one in mine:
            self._reader.prepare(np.concatenate(packs_of_one))
        step_rows = np.concatenate(packs)
        return StepBatch(
            state=state,
            micro_batches=[
                read_micro_batch(self._reader, packs_of_one, data, self._vocab_size)
                for packs_of_one in mine
            ],
            packs=packs,
            num_tokens=int(self._rows.num_tokens[step_rows].sum()),
            num_labels=int(self._rows.num_labels[step_rows].sum()),
        )


def read_micro_batch(
    reader: "RowReader", packs: list[Int64s], data: DataConfig, vocab_size: int
) -> MicroBatch:
    """Reads and packs the rows of a micro-batch.

    Args:
        reader: reads the view.
        packs: row ids of each sequence, in order; may be empty.
        data: sets the maximum length.
        vocab_size: rows of the student's output head.
    """
    table = reader.rows
    lengths = [table.num_tokens[pack].astype(np.int64) for pack in packs]
    padded = padded_length([int(pack.sum()) for pack in lengths], data.max_tokens)
    row_starts = np.concatenate(
        [np.cumsum(pack) - pack + index * padded for index, pack in enumerate(lengths)]
    )
    ids = np.concatenate(packs)
    rows = reader.gather(ids)
    input_ids, position_ids = lay_out(rows, row_starts, (len(packs), padded))
    targets = build_targets(rows, row_starts, reader.record, vocab_size, table.weight[ids])
    weight = float(targets.weights.sum(dtype=torch.float64))
    return MicroBatch(torch.from_numpy(input_ids), torch.from_numpy(position_ids), targets, weight)


def padded_length(num_tokens: Sequence[int], max_tokens: int) -> int:
    """Length after padding: the longest sequence, rounded up, at most ``max_tokens``."""
    longest = max(1, *num_tokens)
    return min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, max_tokens)


def lay_out(
    rows: LabelRows, row_starts: Int64s, shape: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lays out token ids and position ids of packed rows.

    Args:
        rows: R rows.
        row_starts: int64 [R], increasing offset of each row in the flattened tokens.
        shape: (B, L).

    Returns:
        Two int64 arrays [B, L]. Padding has token id 0 and is a document of its own.
    """
    lengths = np.diff(rows.token_offsets)
    input_ids = np.zeros(shape, np.int64)
    input_ids.reshape(-1)[concatenated_ranges(row_starts, lengths)] = rows.token_ids
    # Document starts: rows, the padding after them, and empty sequences.
    begins = np.zeros(shape[0] * shape[1], np.int64)
    edges = np.concatenate([row_starts, row_starts + lengths, np.arange(shape[0]) * shape[1]])
    edges = edges[edges < begins.size]
    begins[edges] = edges
    position_ids = np.arange(begins.size) - np.maximum.accumulate(begins)
    return input_ids, position_ids.reshape(shape)


@functools.cache
def keep_freed_pages() -> None:
    """Makes Arrow keep freed memory for `DECAY_MS`, for the rest of this process.

    Arrow's default allocator returns pages after 10 ms and faults in new ones for the next row
    group. That took 0.5 of 1.1 us of CPU time per token at 64 ids per label (two busy virtual
    cores); with this setting it takes 0.15 us. No effect without jemalloc, or if
    ``ARROW_DEFAULT_MEMORY_POOL`` is set.
    """
    if "ARROW_DEFAULT_MEMORY_POOL" in os.environ:
        return
    if "jemalloc" in pa.supported_memory_backends():
        pa.jemalloc_set_decay_ms(DECAY_MS)
        pa.set_memory_pool(pa.jemalloc_memory_pool())


class RowReader:
    """Reads rows by id through a cache of decoded row groups.

    Attributes:
        record: the record that the view serves; label sets may store richer ones.
        rows: the table that row ids index.
    """

    def __init__(
        self, view: TrainingView, rows: RowTable, loss: LossConfig, cache_bytes: int
    ) -> None:
        """
        Args:
            view: the view to read.
            rows: the view's rows, from `read_row_table`.
            loss: decides which columns are read.
            cache_bytes: memory limit of the cache; the row group in use may exceed it.

        Raises:
            ConfigError: the label sets of the view have different records.
        """
        keep_freed_pages()
        self.record = common_record(view)
        self._label_sets, self.rows = view.label_sets, rows
        self._loss = loss
        columns = loss_columns(loss, self.record)
        empty = arrow_schema(self.record).empty_table().select(columns)
        self._no_rows = LabelRows.from_table(empty, self.record)
        self._cache_bytes, self._held_bytes = cache_bytes, 0
        self._cache: OrderedDict[int, LabelRows] = OrderedDict()
        # Decoding releases the GIL, so other threads can decode while this one gathers.
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="row-group")
        self._pending: dict[int, Future[LabelRows]] = {}

    def prepare(self, ids: Int64s) -> None:
        """Starts reading the row groups that ``gather`` will need."""
        for group in np.unique(self.rows.group[ids]).tolist():
            if group not in self._cache and group not in self._pending:
                self._pending[group] = self._pool.submit(self._read, group)

    def gather(self, ids: Int64s) -> LabelRows:
        """Returns rows in the order of the ids; columns that the loss does not use are None."""
        self.prepare(ids)
        if not len(ids):
            return self._no_rows
        groups = self.rows.group[ids].tolist()
        held = {group: self._get(group) for group in dict.fromkeys(groups)}
        return LabelRows.gather([held[group] for group in groups], self.rows.row[ids].tolist())

    def close(self) -> None:
        """Stops the reading threads."""
        self._pool.shutdown(cancel_futures=True)

    def _get(self, group: int) -> LabelRows:
        held = self._cache.pop(group, None)
        if held is None:
            future = self._pending.pop(group, None) or self._pool.submit(self._read, group)
            held = future.result()
            self._held_bytes += held.num_bytes
        self._cache[group] = held  # last means most recently used
        while self._held_bytes > self._cache_bytes and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._held_bytes -= oldest.num_bytes
        return held

    def _read(self, group: int) -> LabelRows:
        label_set, shard, number = self.rows.groups[group]
        store = self._label_sets[label_set].store
        stored = self._label_sets[label_set].spec.record
        columns = loss_columns(self._loss, stored)
        rows = read_row_group(store, shard, number, stored, columns=columns)
        return reduce_rows(rows, stored, self.record)


def loss_columns(loss: LossConfig, record: RecordSpec) -> list[str]:
    """Columns of a record that a loss uses."""
    wanted = TEXT_COLUMNS if loss.kind == "hard" else TEXT_COLUMNS + TEACHER_COLUMNS
    return [name for name in record.columns if name in wanted]


def common_record(view: TrainingView) -> RecordSpec:
    """The record shared by all label sets of a view.

    Raises:
        ConfigError: their records differ.
    """
    first = view.records[0]
    for record in view.records[1:]:
        if record.identity() != first.identity():
            raise ConfigError(
                f"view {view.url} mixes label sets of different records ({first} and "
                f"{record}), which cannot be trained on together; make a view of one of them, or "
                "set a record that both can serve"
            )
    return first
