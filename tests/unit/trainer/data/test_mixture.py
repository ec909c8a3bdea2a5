"""Training on several views at once: shares, order, going on."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from schemas.config import dump_toml, load_toml
from schemas.errors import ConfigError
from schemas.spec import RecordSpec
from tests.support.training_runs import make_config, make_view
from trainer.config.train import TrainConfig
from trainer.data.loader import Loader
from trainer.data.mixture import MixedView, open_view
from trainer.data.row_order import (
    LoaderState,
    RowTable,
    epoch_steps,
    read_row_table,
    run_steps,
    view_rows,
)

RECORD = RecordSpec(kind="topk", k=3)
VOCABULARY = {f"t{i}": i for i in range(40)}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("views")
    large = make_view(folder / "large", RECORD, VOCABULARY)
    small = make_view(folder / "small", RECORD, VOCABULARY, num_rows=24, seed=1)
    mixture = [{"view": large.url, "weight": 3.0}, {"view": small.url, "weight": 2.0}]
    return make_config(folder / "run", mixture, "t", data={"steps": 60})


@pytest.fixture(scope="module")
def view(config: TrainConfig) -> MixedView:
    view = open_view(config.view)
    assert isinstance(view, MixedView)
    return view


@pytest.fixture(scope="module")
def rows(config: TrainConfig, view: MixedView) -> RowTable:
    return read_row_table(view, config.data)


def start(view: MixedView, step: int = 0) -> LoaderState:
    return LoaderState(view_hash=view.view_hash, seed=0, epoch=0, step=step)


def test_mixture_holds_its_shares_at_every_step(config, view, rows) -> None:
    seen = np.zeros(2)
    for state, packs in islice(run_steps(rows, config.data, start(view)), 60):
        assert len(packs) == config.data.sequences_per_step
        for pack in packs:
            assert len(set(pack >= 96)) == 1  # one view in a sequence
            seen[int(pack[0] >= 96)] += 1
        assert abs(seen[0] - 0.6 * seen.sum()) < 1
        assert state.epoch == 0


def test_mixture_repeats_each_view_in_its_own_order(config, view, rows) -> None:
    steps = islice(run_steps(rows, config.data, start(view)), 60)
    small = [row for _, packs in steps for pack in packs for row in pack.tolist() if row >= 96]
    alone = read_row_table(open_view(config.view[1].view), config.data)
    first = [r for lanes in epoch_steps(alone, config.data, 0) for lane in lanes for r in lane]
    assert small[:24] == [96 + row for row in first]
    for epoch in range(len(small) // 24):
        assert sorted(small[24 * epoch : 24 * (epoch + 1)]) == list(range(96, 120))
    assert small[24:48] != small[:24]
    assert len(small) > 3 * 24


@pytest.mark.parametrize("done", [1, 7, 41])
def test_mixture_resumes_with_the_rest(config, view, rows, done: int) -> None:
    whole = list(islice(run_steps(rows, config.data, start(view)), done + 5))
    rest = list(islice(run_steps(rows, config.data, whole[done - 1][0]), 5))
    for (state, packs), (expected, others) in zip(rest, whole[done:], strict=True):
        assert state == expected
        for pack, other in zip(packs, others, strict=True):
            assert pack.tolist() == other.tolist()


def test_loader_reads_the_rows_of_both_views(config, view, rows) -> None:
    loader = Loader(config, view, rows, start(view), 0, len(VOCABULARY))
    try:
        batch = next(loader)
    finally:
        loader.close()
    tables = [open_view(part.view) for part in config.view]
    for pack, micro_batch in zip(batch.packs, batch.micro_batches, strict=True):
        number = int(view_rows(view, config.data, pack)[0])
        alone, row = (tables[0], number) if number < 96 else (tables[1], number - 96)
        tokens = alone.label_sets[0].read_rows(alone.table.slice(row, 1)).token_ids
        assert micro_batch.input_ids[0, : len(tokens)].tolist() == tokens.tolist()


def test_mixture_hash_is_of_views_and_shares(config, view) -> None:
    def other(weights: tuple[float, float]) -> str:
        parts = [p.model_copy(update={"weight": w}) for p, w in zip(config.view, weights)]  # noqa: B905
        return open_view(parts).view_hash

    assert other((0.3, 0.2)) == view.view_hash
    assert other((2.0, 3.0)) != view.view_hash


def test_mixture_survives_its_file_and_needs_steps(config, tmp_path: Path) -> None:
    (tmp_path / "train.toml").write_text(dump_toml(config))
    assert load_toml(tmp_path / "train.toml", TrainConfig) == config
    views = [part.model_dump() for part in config.view]
    with pytest.raises(ConfigError, match="mixture, whose views end at different times"):
        make_config(tmp_path, views, "t", data={"steps": None, "epochs": 1})
