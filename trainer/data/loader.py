"""Reads the rows of every global step ahead of the training.

What is read when follows from ``trainer.data.row_order``; the loader adds no order and no state of
its own. One thread per worker plans, reads row groups, gathers rows and builds tensors, a bounded
number of steps ahead; decoded row groups stay in memory up to ``data.cache_bytes``, since a window
of a lane returns to them. Time that the training waits for it is measured where it waits.

Shapes: B packed sequences of a micro-batch, L their padded length.
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
from schemas.spec import RecordSpec
from schemas.views.view import View
from trainer.config.train import DataConfig, LossConfig, TrainConfig
from trainer.data.row_order import Int64s, LoaderState, RowTable, num_micro_batches, run_steps
from trainer.losses.targets import SparseTargets, build_targets

PAD_MULTIPLE = 64
"""Sequences are padded to a multiple of it, so that few different shapes occur."""

DECAY_MS = 10_000
"""Arrow returns memory to the system this long after it was freed; see `keep_freed_pages`."""

TOKEN_COLUMNS = ("row_key", "content_key", "token_ids", "label_spans")
TEACHER_COLUMNS = (
    "head_len",
    "tail_len",
    "entry_ids",
    "entry_logprobs",
    "entry_counts",
    "tail_logmass",
    "lse",
)
"""The columns that losses read; the others stay on disk."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass reads.

    Attributes:
        input_ids: int64 [B, L], packed rows, padded at the end.
        position_ids: int64 [B, L], from 0 in every row; padding counts as a row of its own.
        targets: labels; their positions index the flattened [B * L] tokens.
        weight: sum of the weights of all labelled positions.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: SparseTargets
    weight: float


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of a global step.

    Attributes:
        state: of the loader after this step.
        micro_batches: as many on every rank; those past the end of the lanes weigh nothing.
        packs: for every lane of the whole step the ids of its rows; rank r of W has lanes r mod W.
        num_tokens: tokens of the rows of the whole step, over all ranks.
        num_labels: labelled positions, likewise.
    """

    state: LoaderState
    micro_batches: list[MicroBatch]
    packs: list[Int64s]
    num_tokens: int
    num_labels: int


class Loader:
    """One rank's batches, prepared ahead by a thread. Iterate once; then ``close``.

    Attributes:
        wait_s: seconds that the consumer waited for the latest batch.
    """

    def __init__(
        self,
        config: TrainConfig,
        view: View,
        rows: RowTable,
        start: LoaderState,
        rank: int,
        vocab_size: int,
        world_size: int = 1,
    ) -> None:
        """
        Args:
            start: where to begin; its first step is the one after it.
            rank: of this worker among ``world_size``.
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
        """The next batch.

        Raises:
            TutelageError: what the reading thread met, a damaged shard for example.
        """
        before = time.perf_counter()
        batch = self._ready.get()
        self.wait_s = time.perf_counter() - before
        if isinstance(batch, BaseException):
            raise batch
        return batch

    def close(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        while self._thread.is_alive():
            try:
                self._ready.get_nowait()  # it may wait for room in the queue
            except queue.Empty:
                self._thread.join(0.01)
        self._reader.close()

    def _run(self) -> None:
        try:
            for state, packs in run_steps(self._rows, self._config.data, self._start):
                self._ready.put(self._load(state, packs))
                if self._stopped.is_set():
                    return
            self._ready.put(StudentError("the loader was asked for more steps than were planned"))
        except BaseException as error:  # noqa: BLE001  (raised again in the training thread)
            self._ready.put(error)

    def _load(self, state: LoaderState, packs: list[Int64s]) -> StepBatch:
        data = self._config.data
        size = data.micro_batch_size
        mine = packs[self._rank :: self._world_size]
        num_packs = num_micro_batches(data, self._world_size) * size
        mine += [np.empty(0, np.int64)] * (num_packs - len(mine))
        self._reader.prepare(np.concatenate(mine))
        step_rows = np.concatenate(packs)
        return StepBatch(
            state=state,
            micro_batches=[
                read_micro_batch(self._reader, mine[first : first + size], data, self._vocab_size)
                for first in range(0, len(mine), size)
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
        packs: for every sequence the ids of its rows, in order; may be empty.
        vocab_size: rows of the student's output head.
    """
    table = reader.rows
    lengths = [table.num_tokens[pack].astype(np.int64) for pack in packs]
    padded = padded_length([int(pack.sum()) for pack in lengths], data.max_tokens)
    row_starts = np.concatenate(
        [np.cumsum(pack) - pack + place * padded for place, pack in enumerate(lengths)]
    )
    ids = np.concatenate(packs)
    rows = reader.gather(ids)
    input_ids, position_ids = lay_out(rows, row_starts, (len(packs), padded))
    targets = build_targets(rows, row_starts, reader.record, vocab_size, table.weight[ids])
    weight = float(targets.weights.sum(dtype=torch.float64))
    return MicroBatch(torch.from_numpy(input_ids), torch.from_numpy(position_ids), targets, weight)


def padded_length(num_tokens: Sequence[int], max_tokens: int) -> int:
    """Length to pad packed sequences to: the longest, rounded up, but at most ``max_tokens``."""
    longest = max(1, *num_tokens)
    return min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, max_tokens)


def lay_out(
    rows: LabelRows, row_starts: Int64s, shape: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids and position ids of packed rows.

    Args:
        rows: R rows.
        row_starts: int64 [R], where each begins in the flattened tokens; rising.
        shape: (B, L).

    Returns:
        Two int64 arrays [B, L]. Padding has token id 0 and positions that restart where it begins,
        so that it is a document of its own.
    """
    lengths = np.diff(rows.token_offsets)
    places = np.arange(rows.num_tokens) + np.repeat(row_starts - rows.token_offsets[:-1], lengths)
    input_ids = np.zeros(shape, np.int64)
    input_ids.reshape(-1)[places] = rows.token_ids
    # Every document begins at a place of this list: rows, the padding behind them, empty sequences.
    begins = np.zeros(shape[0] * shape[1], np.int64)
    edges = np.concatenate([row_starts, row_starts + lengths, np.arange(shape[0]) * shape[1]])
    edges = edges[edges < begins.size]
    begins[edges] = edges
    position_ids = np.arange(begins.size) - np.maximum.accumulate(begins)
    return input_ids, position_ids.reshape(shape)


@functools.cache
def keep_freed_pages() -> None:
    """Has Arrow hold on to freed memory for seconds, from now on in this process.

    Its default allocator gives pages back after 10 ms and takes fresh ones for the next row group,
    which took 0.5 us of CPU time a token at 64 ids a label, of 1.1 (two busy virtual cores); with
    this it is 0.15. Where there is no jemalloc, or ``ARROW_DEFAULT_MEMORY_POOL`` says what to use,
    nothing is changed.
    """
    if "ARROW_DEFAULT_MEMORY_POOL" in os.environ:
        return
    if "jemalloc" in pa.supported_memory_backends():
        pa.jemalloc_set_decay_ms(DECAY_MS)
        pa.set_memory_pool(pa.jemalloc_memory_pool())


class RowReader:
    """Rows by their id, from decoded row groups that are kept up to a number of bytes.

    Attributes:
        record: what the view promises of all its label sets; they may hold more.
        rows: what the ids count through.
    """

    def __init__(self, view: View, rows: RowTable, loss: LossConfig, cache_bytes: int) -> None:
        """
        Raises:
            ConfigError: the view promises different records of its label sets.
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
        # Decoding releases the GIL, so a second thread reads on while this one gathers.
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="row-group")
        self._pending: dict[int, Future[LabelRows]] = {}

    def prepare(self, ids: Int64s) -> None:
        """Starts to read the row groups that ``gather`` will need."""
        for group in np.unique(self.rows.group[ids]).tolist():
            if group not in self._cache and group not in self._pending:
                self._pending[group] = self._pool.submit(self._read, group)

    def gather(self, ids: Int64s) -> LabelRows:
        """The rows, in the order of the ids; columns that the loss does not read are None."""
        self.prepare(ids)
        if not len(ids):
            return self._no_rows
        groups = self.rows.group[ids].tolist()
        held = {group: self._get(group) for group in dict.fromkeys(groups)}
        return LabelRows.gather([held[group] for group in groups], self.rows.row[ids].tolist())

    def close(self) -> None:
        """Ends the reading threads."""
        self._pool.shutdown(cancel_futures=True)

    def _get(self, group: int) -> LabelRows:
        held = self._cache.pop(group, None)
        if held is None:
            future = self._pending.pop(group, None) or self._pool.submit(self._read, group)
            held = future.result()
            self._held_bytes += held.num_bytes
        self._cache[group] = held  # the last one is the latest used
        while self._held_bytes > self._cache_bytes and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._held_bytes -= oldest.num_bytes
        return held

    def _read(self, group: int) -> LabelRows:
        label_set, shard, number = self.rows.groups[group]
        store = self._label_sets[label_set].store
        have = self._label_sets[label_set].spec.record
        rows = read_row_group(store, shard, number, have, columns=loss_columns(self._loss, have))
        return reduce_rows(rows, have, self.record)


def loss_columns(loss: LossConfig, record: RecordSpec) -> list[str]:
    """The columns to read for a loss, of those that a record has."""
    wanted = TOKEN_COLUMNS if loss.kind == "hard" else TOKEN_COLUMNS + TEACHER_COLUMNS
    return [name for name in record.columns if name in wanted]


def common_record(view: View) -> RecordSpec:
    """The record spec that a view promises of all its label sets.

    Raises:
        ConfigError: they differ.
    """
    first = view.records[0]
    for record in view.records[1:]:
        if record.identity() != first.identity():
            raise ConfigError(
                f"view {view.url} mixes label sets of different records ({first} and "
                f"{record}), which cannot be trained on together; make a view of one of them, or "
                "one that promises less of both"
            )
    return first
