"""The row order of training: which rows form each global step.

The order is a pure function of the view's rows, the seed and the epoch. It does not depend on the
world size, so a run resumes unchanged on another number of workers; nor on the labels, so students
of two label sets with the same row groups see the same rows in the same order. Shuffling has two
levels, because a full permutation would decode every row group once per row:

* The view is cut into *chunks*, contiguous rows of one row group: entire row groups if the view has
  many, pieces otherwise (`CHUNKS_PER_LANE`).
* Chunks are dealt to the lanes (``data.sequences_per_step``) in seeded order, each to the lane with
  the fewest tokens so far. A lane shuffles rows within a window of ``data.window_row_groups``
  chunks and packs them.

Global step s takes pack s of every lane. An exhausted lane yields empty packs of weight 0; the
epoch ends when all lanes are exhausted. Its last steps may thus be partly empty, but every row is
read exactly once per epoch. Only the current windows are planned, never the full epoch.

Shapes: R rows, C chunks.
"""

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import count, islice, zip_longest

import numpy as np
import pyarrow as pa

from schemas.config import StrictModel
from schemas.errors import ConfigError
from schemas.label_set.tables import key_array
from trainer.config.train import DataConfig
from trainer.data.mixture import MixedView, TrainingView, sequence_source, sequences_per_view
from trainer.data.packing import Packer

PACKER_VERSION = 2
"""Version of the row order: packing, dealing and shuffling. Incremented whenever the order changes
for the same view, seed and epoch. Stored in loader states as ``packer_version``."""

CHUNKS_PER_LANE = 16
"""Chunks per lane, given enough rows. Lanes then end within about a sixteenth of an epoch of each
other, however few row groups the view has."""

Int32s = np.ndarray[tuple[int], np.dtype[np.int32]]
Int64s = np.ndarray[tuple[int], np.dtype[np.int64]]

_ORDER_DEPENDS_ON = {
    "view_hash": "open the original view",
    "seed": "set the same data.seed",
    "packer_version": "use the version of Tutelage that wrote it",
}
"""What determines the order besides the epoch, and how to restore it."""


class LoaderState(StrictModel):
    """Position of a run in its data; the complete state of the loader.

    Attributes:
        step: completed global steps of this epoch.
        packer_version: see `PACKER_VERSION`.
    """

    view_hash: str
    seed: int
    epoch: int
    step: int
    packer_version: int = PACKER_VERSION

    def check_order(self, now: "LoaderState", what: str, instead: str) -> None:
        """Checks that this state belongs to the current row order.

        Args:
            now: start state of the current order.
            what: source of this state, for the message.
            instead: alternative to restoring the old order, for the message.

        Raises:
            ConfigError: the row orders differ.
        """
        for name, remedy in _ORDER_DEPENDS_ON.items():
            theirs, ours = getattr(self, name), getattr(now, name)
            if theirs != ours:
                raise ConfigError(
                    f"{what} was written with {name} = {theirs}, but here it is {ours}; resuming "
                    f"would skip some rows and repeat others. To resume, {remedy}; or {instead}"
                )


@dataclass(frozen=True)
class RowTable:
    """Lengths and locations of the rows to train on, in the order of the view.

    Attributes:
        num_tokens: int32 [R], tokens per row.
        num_labels: int32 [R], labelled positions per row.
        weight: float32 [R], factor on the loss of every position of the row.
        group: int32 [R], index into ``groups``.
        row: int32 [R], row number within its row group.
        groups: (index of the label set, shard, row group number) of every row group.
        num_dropped: rows dropped because they are longer than ``data.max_tokens``.
        order_key: hash of the row keys in order, independent of the labels.
        parts: for a mixture, one RowTable per view; ids are concatenated in this order. Else empty.
        shares: for a mixture, the share of each view.
    """

    num_tokens: Int32s
    num_labels: Int32s
    weight: np.ndarray[tuple[int], np.dtype[np.float32]]
    group: Int32s
    row: Int32s
    groups: list[tuple[int, str, int]]
    num_dropped: int
    order_key: str
    parts: tuple["RowTable", ...] = ()
    shares: tuple[Fraction, ...] = ()

    def __len__(self) -> int:
        return len(self.num_tokens)


def read_row_table(view: TrainingView, data: DataConfig) -> RowTable:
    """Reads the table of rows with at most ``data.max_tokens`` tokens.

    Raises:
        ConfigError: the view is empty; some rows are too long and ``data.long_rows`` is "error"; or
            all rows are too long.
    """
    table = view.table
    lengths = _numpy(table, "num_tokens", np.int32)
    if not len(lengths):
        raise ConfigError(f"view {view.url} has no rows; label some, or choose another view")
    fits = lengths <= data.max_tokens
    num_dropped = int(len(fits) - fits.sum())
    if num_dropped and (data.long_rows == "error" or num_dropped == len(fits)):
        longest = int(np.argmax(lengths))
        raise ConfigError(
            f"{num_dropped} of {len(fits)} rows of view {view.url} are longer than data.max_tokens "
            f"= {data.max_tokens}; the longest, row {longest}, has {lengths[longest]} tokens. "
            "Raise data.max_tokens, label with a smaller text.max_tokens"
            + ("" if num_dropped == len(fits) else ', or drop them: data.long_rows = "drop"')
        )
    shard_codes, shards = _dictionary(table, "shard")
    places = np.stack(
        [_numpy(table, "label_set", np.int32), shard_codes, _numpy(table, "row_group", np.int32)],
        axis=1,
    )[fits]
    starts = np.flatnonzero(np.r_[True, (places[1:] != places[:-1]).any(axis=1)])
    sizes = np.diff(np.r_[starts, len(places)])
    rows = RowTable(
        num_tokens=lengths[fits],
        num_labels=_numpy(table, "num_labels", np.int32)[fits],
        weight=_numpy(table, "weight", np.float32)[fits],
        group=np.repeat(np.arange(len(starts), dtype=np.int32), sizes),
        row=_numpy(table, "row", np.int32)[fits],
        groups=[(int(s), shards[c], int(g)) for s, c, g in places[starts].tolist()],
        num_dropped=num_dropped,
        order_key=_order_key(table, fits),
    )
    return _with_parts(rows, view, fits) if isinstance(view, MixedView) else rows


def epoch_steps(rows: RowTable, data: DataConfig, epoch: int) -> Iterator[list[Int64s]]:
    """Plans the global steps of one epoch.

    Yields:
        One pack per lane: row ids (int64, indices into ``rows``) in order; empty for an exhausted
        lane.
    """
    empty = np.empty(0, np.int64)
    lanes = [
        _lane_packs(chunks, rows, data, (rows.order_key, data.seed, epoch, lane))
        for lane, chunks in enumerate(deal_chunks(rows, data, epoch))
    ]
    for packs in zip_longest(*lanes):
        yield [empty if pack is None else np.array(pack, np.int64) for pack in packs]


def run_steps(
    rows: RowTable, data: DataConfig, start: LoaderState
) -> Iterator[tuple[LoaderState, list[Int64s]]]:
    """Plans the global steps after ``start``.

    The steps before ``start.step`` are replanned from row lengths, without reading a shard.

    Yields:
        The state after the step, and its packs (see `epoch_steps`). Ends after ``data.epochs``
        epochs, or never if ``data.steps`` is set instead.
    """
    if rows.parts:
        yield from _mixed_steps(rows, data, start)
        return
    epoch, done = start.epoch, start.step
    while data.epochs is None or epoch < data.epochs:
        steps = epoch_steps(rows, data, epoch)
        for number, step in enumerate(islice(steps, done, None), start=done + 1):
            yield start.model_copy(update={"epoch": epoch, "step": number}), step
        epoch, done = epoch + 1, 0


def _mixed_steps(
    rows: RowTable, data: DataConfig, start: LoaderState
) -> Iterator[tuple[LoaderState, list[Int64s]]]:
    """Yields the global steps of a mixture without end; they count as one epoch."""
    lanes = data.sequences_per_step
    firsts = np.cumsum([0, *map(len, rows.parts)])
    done = sequences_per_view(start.step * lanes, rows.shares)
    streams = [
        islice(_packs(part, data), skip, None) for part, skip in zip(rows.parts, done, strict=True)
    ]
    for step in count(start.step):
        chosen = [sequence_source(step * lanes + lane, rows.shares)[0] for lane in range(lanes)]
        packs = [next(streams[part]) + firsts[part] for part in chosen]
        yield start.model_copy(update={"step": step + 1}), packs


def _packs(rows: RowTable, data: DataConfig) -> Iterator[Int64s]:
    """Yields the packs of one view of a mixture, epoch after epoch."""
    for epoch in count():
        for step in epoch_steps(rows, data, epoch):
            yield from (pack for pack in step if len(pack))


def _with_parts(rows: RowTable, mixture: MixedView, fits: np.ndarray) -> RowTable:
    """Adds the parts and shares of a mixture to its row table."""
    parts, first, start = [], 0, 0
    for view in mixture.views:
        mask = fits[first : first + len(view.table)]
        stop = start + int(mask.sum())
        if start == stop:
            raise ConfigError(
                f"every row of view {view.url} is longer than data.max_tokens; raise it, or "
                "remove the view from the mixture"
            )
        names = ("num_tokens", "num_labels", "weight", "group", "row")
        columns = {name: getattr(rows, name)[start:stop] for name in names}
        parts.append(replace(rows, **columns, order_key=_order_key(view.table, mask)))
        first, start = first + len(mask), stop
    return replace(rows, parts=tuple(parts), shares=mixture.shares)


def _order_key(table: pa.Table, fits: np.ndarray) -> str:
    return hashlib.sha256(key_array(table, "row_key")[fits].tobytes()).hexdigest()[:32]


def count_steps(rows: RowTable, data: DataConfig) -> int:
    """Counts the global steps of the run; plans every epoch if ``data.epochs`` is set."""
    if data.steps is not None:
        return data.steps
    return sum(sum(1 for _ in epoch_steps(rows, data, epoch)) for epoch in range(data.epochs or 0))


def num_micro_batches(data: DataConfig, world_size: int) -> int:
    """Micro-batches per rank and global step: gradient_accumulation_steps.

    Collectives require the same number on all ranks. The rank with the most lanes determines it;
    the others add empty micro-batches. So the world size need not divide
    ``data.sequences_per_step``, and may exceed it.
    """
    lanes = -(-data.sequences_per_step // world_size)
    return -(-lanes // data.micro_batch_size)


def rank_micro_batches(
    packs: list[Int64s], data: DataConfig, rank: int, world_size: int
) -> list[list[Int64s]]:
    """Groups one rank's packs into micro-batches; rank r of W takes the lanes r mod W.

    Returns:
        `num_micro_batches` lists of ``data.micro_batch_size`` packs, padded with empty packs.
    """
    size, number = data.micro_batch_size, num_micro_batches(data, world_size)
    mine = packs[rank::world_size]
    mine += [np.empty(0, np.int64)] * (number * size - len(mine))
    return [mine[first : first + size] for first in range(0, len(mine), size)]


def view_rows(view: TrainingView, data: DataConfig, ids: Int64s) -> Int64s:
    """Maps ids in the `RowTable`, which omits long rows, to row numbers in the view's table."""
    fits = _numpy(view.table, "num_tokens", np.int32) <= data.max_tokens
    return np.flatnonzero(fits)[ids]


def deal_chunks(rows: RowTable, data: DataConfig, epoch: int) -> list[list[tuple[int, int]]]:
    """Deals the chunks of a view to the lanes.

    Returns:
        The chunks of each lane, half-open ranges of row ids, in reading order.
    """
    num_lanes = data.sequences_per_step
    bounds = cut_chunks(rows.group, CHUNKS_PER_LANE * num_lanes)
    total = np.r_[0, np.cumsum(rows.num_tokens, dtype=np.int64)]
    tokens = np.diff(total[bounds])
    lanes: list[list[tuple[int, int]]] = [[] for _ in range(num_lanes)]
    loads = [(0, lane) for lane in range(num_lanes)]
    for chunk in shuffled(len(tokens), rows.order_key, data.seed, epoch, "chunks").tolist():
        load, lane = loads[0]
        lanes[lane].append((int(bounds[chunk]), int(bounds[chunk + 1])))
        heapq.heapreplace(loads, (load + int(tokens[chunk]), lane))
    return lanes


def cut_chunks(group: Int32s, num_wanted: int) -> Int64s:
    """Cuts rows into at least ``num_wanted`` chunks, given enough rows.

    Args:
        group: int32 [R], row group of every row; rows of a group are contiguous.

    Returns:
        int64 [C + 1], chunk bounds; no chunk spans two row groups.
    """
    starts = np.flatnonzero(np.r_[True, group[1:] != group[:-1]])
    sizes = np.diff(np.r_[starts, len(group)])
    rows_per_chunk = len(group) if len(starts) >= num_wanted else max(1, len(group) // num_wanted)
    pieces = -(-sizes // rows_per_chunk)
    piece = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    bounds = np.repeat(starts, pieces) + np.repeat(sizes, pieces) * piece // np.repeat(
        pieces, pieces
    )
    return np.r_[bounds, len(group)].astype(np.int64)


def shuffled(size: int, *key: object) -> Int64s:
    """Returns a permutation of range(size), a pure function of the key."""
    # The raw stream of Philox is stable across numpy releases; Generator.permutation is not.
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=16).digest()
    draws = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(size)
    return np.argsort(draws, kind="stable")


def _lane_packs(
    chunks: list[tuple[int, int]], rows: RowTable, data: DataConfig, key: tuple[object, ...]
) -> Iterator[list[int]]:
    packer = Packer(data.max_tokens)
    for window in range(0, len(chunks), data.window_row_groups):
        ranges = chunks[window : window + data.window_row_groups]
        ids = np.concatenate([np.arange(start, stop) for start, stop in ranges])
        ids = ids[shuffled(len(ids), *key, window)]
        yield from packer.add(ids.tolist(), rows.num_tokens[ids].tolist())
    yield from packer.flush()


def _numpy(table: pa.Table, column: str, dtype: type[np.generic]) -> np.ndarray:
    return table[column].to_numpy().astype(dtype, copy=False)


def _dictionary(table: pa.Table, column: str) -> tuple[Int32s, list[str]]:
    """Codes and values of a dictionary-encoded string column."""
    array = table[column].unify_dictionaries().combine_chunks()
    return array.indices.to_numpy().astype(np.int32, copy=False), array.dictionary.to_pylist()
