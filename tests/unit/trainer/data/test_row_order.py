"""The order of rows: what it depends on, and what it does not."""

from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import pyarrow as pa
import pytest

from schemas.errors import ConfigError
from trainer.config.train import DataConfig
from trainer.data.row_order import (
    CHUNKS_PER_LANE,
    LoaderState,
    RowTable,
    count_steps,
    cut_chunks,
    deal_chunks,
    epoch_steps,
    read_row_table,
    run_steps,
    shuffled,
)


def make_rows(sizes: list[int], seed: int = 0, longest: int = 64) -> RowTable:
    """Rows of random lengths in row groups of the given sizes."""
    lengths = np.random.default_rng(seed).integers(1, longest + 1, sum(sizes)).astype(np.int32)
    return RowTable(
        num_tokens=lengths,
        num_labels=lengths - 1,
        weight=np.ones(len(lengths), np.float32),
        group=np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
        row=np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]),
        groups=[(0, "shards/a.parquet", number) for number in range(len(sizes))],
        num_dropped=0,
        order_key="rows",
    )


def make_data(lanes: int = 4, **fields: object) -> DataConfig:
    return DataConfig.model_validate(
        {"max_tokens": 64, "sequences_per_step": lanes, "epochs": 1, **fields}
    )


def flat(steps: list[list[np.ndarray]]) -> list[list[list[int]]]:
    return [[lane.tolist() for lane in step] for step in steps]


def test_shuffled_is_frozen() -> None:
    """The order of a run must survive new versions of this code and of numpy."""
    assert shuffled(8, "view", 0, 1, "chunks").tolist() == [2, 5, 7, 6, 3, 0, 4, 1]
    assert sorted(shuffled(100, "a").tolist()) == list(range(100))
    assert shuffled(100, "a").tolist() != shuffled(100, "b").tolist()


def test_order_depends_on_view_seed_and_epoch() -> None:
    rows, data = make_rows([40] * 6), make_data()
    first = flat(list(epoch_steps(rows, data, 0)))
    assert flat(list(epoch_steps(rows, data, 0))) == first
    assert flat(list(epoch_steps(replace(rows, order_key="other"), data, 0))) != first
    assert flat(list(epoch_steps(rows, data, 1))) != first
    assert flat(list(epoch_steps(rows, make_data(seed=1), 0))) != first


def test_order_resumes_with_the_rest_of_the_run() -> None:
    rows, data = make_rows([30] * 5), make_data(epochs=3)
    start = LoaderState(view_hash="v", seed=0, epoch=0, step=0)
    whole = [(state, flat([step])) for state, step in run_steps(rows, data, start)]
    for done in (0, 1, 5, len(whole) - 1):
        state = start if done == 0 else whole[done - 1][0]
        rest = [(state, flat([step])) for state, step in run_steps(rows, data, state)]
        assert rest == whole[done:]


def test_resuming_after_the_last_step_of_an_epoch_starts_the_next() -> None:
    rows, data = make_rows([30] * 5), make_data(epochs=2)
    steps = count_steps(rows, make_data(epochs=1))
    state = LoaderState(view_hash="v", seed=0, epoch=0, step=steps)
    following, _ = next(run_steps(rows, data, state))
    assert (following.epoch, following.step) == (1, 1)


def test_loader_state_refuses_another_order() -> None:
    now = LoaderState(view_hash="v", seed=0, epoch=0, step=0)
    later = LoaderState(view_hash="v", seed=0, epoch=2, step=9)
    later.check_order(now, "it", "start again")
    for name, value in (("view_hash", "w"), ("seed", 1), ("packer_version", 1)):
        other = later.model_copy(update={name: value})
        named = rf"it was written with {name} = {value}, but here it is .* start again"
        with pytest.raises(ConfigError, match=named):
            other.check_order(now, "it", "start again")


def test_steps_run_over_as_many_epochs_as_they_need() -> None:
    rows, data = make_rows([10]), make_data(epochs=None, steps=100)
    start = LoaderState(view_hash="v", seed=0, epoch=0, step=0)
    states = [state for state, _ in islice(run_steps(rows, data, start), 100)]
    assert len(states) == 100 == count_steps(rows, data)
    assert states[-1].epoch > 3


def test_lane_that_ran_dry_gives_empty_packs() -> None:
    rows = make_rows([3], longest=64)
    steps = list(epoch_steps(rows, make_data(lanes=4), 0))
    assert all(len(step) == 4 for step in steps)
    assert sum(len(lane) == 0 for step in steps for lane in step) >= 1


def test_lanes_end_at_about_the_same_step() -> None:
    rows = make_rows([500, 400, 700], longest=64)
    data = make_data(lanes=8)
    loads = [
        sum(int(rows.num_tokens[start:stop].sum()) for start, stop in chunks)
        for chunks in deal_chunks(rows, data, 0)
    ]
    assert (max(loads) - min(loads)) / max(loads) < 1.5 / CHUNKS_PER_LANE


def test_row_groups_stay_whole_where_there_are_many() -> None:
    group = np.repeat(np.arange(20, dtype=np.int32), 7)
    assert cut_chunks(group, 16).tolist() == list(range(0, 141, 7))


def test_few_row_groups_are_cut_into_contiguous_pieces() -> None:
    group = np.repeat(np.arange(2, dtype=np.int32), [50, 30])
    bounds = cut_chunks(group, 16)
    assert len(bounds) - 1 >= 16
    assert 50 in bounds
    assert np.diff(bounds).min() >= 1


def test_never_more_chunks_than_rows() -> None:
    assert cut_chunks(np.zeros(3, np.int32), 64).tolist() == [0, 1, 2, 3]


@dataclass
class ViewOfTable:
    """The two attributes of a view that planning reads."""

    table: pa.Table
    url: str = "views/x"


def view_table(lengths: list[int]) -> ViewOfTable:
    size = len(lengths)
    shards = ["a", "a", "a", "b", "b"]
    return ViewOfTable(
        pa.table(
            {
                "row_key": pa.array([bytes([n] * 16) for n in range(size)], pa.binary(16)),
                "label_set": pa.array([0] * size, pa.int16()),
                "shard": pa.array(shards[:size]).dictionary_encode(),
                "row_group": pa.array([0, 0, 1, 0, 0][:size], pa.int32()),
                "row": pa.array([0, 1, 0, 0, 1][:size], pa.int32()),
                "num_tokens": pa.array(lengths, pa.int32()),
                "num_labels": pa.array([n - 1 for n in lengths], pa.int32()),
                "weight": pa.array([1.0] * size, pa.float32()),
            }
        )
    )


def test_places_of_rows_are_read_from_the_view() -> None:
    rows = read_row_table(view_table([5, 6, 7, 8, 9]), make_data())
    assert rows.groups == [(0, "a", 0), (0, "a", 1), (0, "b", 0)]
    assert rows.group.tolist() == [0, 0, 1, 2, 2]
    assert rows.row.tolist() == [0, 1, 0, 0, 1]


def test_row_longer_than_the_context_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"1 of 5 rows .* row 3, has 65 tokens.*long_rows"):
        read_row_table(view_table([5, 64, 7, 65, 9]), make_data())


def test_long_rows_may_be_dropped_and_are_counted() -> None:
    rows = read_row_table(view_table([5, 6, 65, 65, 9]), make_data(long_rows="drop"))
    assert rows.num_dropped == 2
    assert rows.num_tokens.tolist() == [5, 6, 9]
    assert rows.groups == [(0, "a", 0), (0, "b", 0)]
    assert rows.row.tolist() == [0, 1, 1]


def test_view_of_long_rows_only_is_an_error() -> None:
    with pytest.raises(ConfigError, match="5 of 5 rows"):
        read_row_table(view_table([65] * 5), make_data(long_rows="drop"))


def test_empty_view_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no rows"):
        read_row_table(view_table([]), make_data())
