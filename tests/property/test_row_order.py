"""What holds for the order of every view: each row once, no pack too long, any world size alike."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.train import DataConfig
from trainer.data.row_order import LoaderState, RowTable, count_steps, epoch_steps, run_steps

MAX_TOKENS = 32


@st.composite
def row_tables(draw: st.DrawFn) -> RowTable:
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))
    total = sum(sizes)
    lengths = draw(st.lists(st.integers(1, MAX_TOKENS), min_size=total, max_size=total))
    return RowTable(
        num_tokens=np.array(lengths, np.int32),
        num_labels=np.array(lengths, np.int32) - 1,
        weight=np.ones(total, np.float32),
        group=np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
        row=np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]),
        groups=[(0, "shard", number) for number in range(len(sizes))],
        num_dropped=0,
        order_key="rows",
    )


configs = st.builds(
    DataConfig,
    max_tokens=st.just(MAX_TOKENS),
    sequences_per_step=st.integers(1, 7),
    seed=st.integers(0, 3),
    epochs=st.just(1),
    window_row_groups=st.integers(1, 5),
)


@settings(deadline=None)
@given(rows=row_tables(), data=configs, epoch=st.integers(0, 2))
def test_epoch_reads_every_row_once(rows: RowTable, data: DataConfig, epoch: int) -> None:
    steps = list(epoch_steps(rows, data, epoch))
    read = np.concatenate([pack for step in steps for pack in step])
    assert sorted(read.tolist()) == list(range(len(rows)))
    assert all(rows.num_tokens[pack].sum() <= MAX_TOKENS for step in steps for pack in step)
    assert all(any(len(pack) for pack in step) for step in steps)


@settings(deadline=None)
@given(rows=row_tables(), data=configs, num_epochs=st.integers(1, 3), share=st.floats(0, 1))
def test_stopping_anywhere_loses_and_repeats_nothing(
    rows: RowTable, data: DataConfig, num_epochs: int, share: float
) -> None:
    data = data.model_copy(update={"epochs": num_epochs})
    start = LoaderState(view_hash="view", seed=data.seed, epoch=0, step=0)
    whole = list(run_steps(rows, data, start))
    assert len(whole) == count_steps(rows, data)
    stop = round(share * (len(whole) - 1))
    rest = list(run_steps(rows, data, whole[stop][0]))
    read = [pack for _, step in whole[: stop + 1] + rest for pack in step]
    assert np.bincount(np.concatenate(read)).tolist() == [num_epochs] * len(rows)


@settings(deadline=None)
@given(rows=row_tables(), data=configs, world_size=st.integers(1, 5))
def test_ranks_share_every_step_without_overlap(
    rows: RowTable, data: DataConfig, world_size: int
) -> None:
    for step in epoch_steps(rows, data, 0):
        shares = [step[rank::world_size] for rank in range(world_size)]
        together = [row for share in shares for pack in share for row in pack.tolist()]
        assert sorted(together) == sorted(row for pack in step for row in pack.tolist())
