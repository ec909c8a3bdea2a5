"""A view as a torch dataset: the trainer's own order and batches, in any number of processes."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import trainer
from schemas.errors import ConfigError, VocabularyError
from schemas.spec import RecordSpec
from schemas.views.view import View
from tests.support.training_runs import make_config, make_view
from trainer import DataConfig, LossConfig, ViewDataset
from trainer.data.loader import Loader, StepBatch
from trainer.data.row_order import LoaderState, count_steps, read_row_table

RECORD = RecordSpec(kind="topk", k=3, temperatures=(2.0,), entropy=False)
VOCABULARY = {f"t{i}": i for i in range(40)}
LOSS = LossConfig(kind="ghost", alpha=0.7)


class Words:
    """What a dataset asks of a tokenizer."""

    def __init__(self, vocabulary: dict[str, int]) -> None:
        self._vocabulary = vocabulary

    def get_vocab(self) -> dict[str, int]:
        return self._vocabulary


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> View:
    return make_view(tmp_path_factory.mktemp("view"), RECORD, VOCABULARY)


def data(**fields: Any) -> DataConfig:
    return DataConfig(**{"max_tokens": 64, "sequences_per_step": 3, "epochs": 2, **fields})


def dataset(view: View, data: DataConfig, rank: int = 0, world_size: int = 1) -> ViewDataset:
    return ViewDataset(view.url, data, LOSS, 40, Words(VOCABULARY), rank, world_size)


def of_the_trainer(view: View, data: DataConfig, rank: int, world_size: int) -> list[StepBatch]:
    config = make_config(Path("run"), view.url, "tokenizer", data={"steps": None, "epochs": 2})
    config = config.model_copy(update={"data": data, "loss": LOSS})
    rows = read_row_table(view, data)
    start = LoaderState(view_hash=view.view_hash, seed=data.seed, epoch=0, step=0)
    loader = Loader(config, view, rows, start, rank, 40, world_size)
    try:
        return [next(loader) for _ in range(count_steps(rows, data))]
    finally:
        loader.close()


def assert_same(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours["input_ids"], theirs.input_ids)
    assert torch.equal(ours["position_ids"], theirs.position_ids)
    for name, value in vars(theirs.targets).items():
        found = getattr(ours["targets"], name)
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value


@pytest.mark.parametrize("length", [{"epochs": 2}, {"epochs": None, "steps": 23}])
@pytest.mark.parametrize("world_size", [1, 2])
def test_view_dataset_gives_the_trainers_batches(view, length, world_size):
    wanted = data(**length)
    totals: dict[int, float] = {}
    for rank in range(world_size):
        theirs = of_the_trainer(view, wanted, rank, world_size)
        ours = dataset(view, wanted, rank, world_size)
        found = list(DataLoader(ours, batch_size=None))
        flat = [micro_batch for step in theirs for micro_batch in step.micro_batches]
        assert len(found) == len(flat) == ours.num_steps() * ours.micro_batches_per_step
        for one, other in zip(found, flat, strict=True):
            assert_same(one, other)
        for number, one in enumerate(found):
            step = number // ours.micro_batches_per_step
            totals[step] = totals.get(step, 0.0) + float(one["targets"].weights.sum())
    for number, one in enumerate(found):  # every rank knows the weight of the whole step
        assert one["step_weight"] == pytest.approx(totals[number // ours.micro_batches_per_step])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_view_dataset_gives_the_same_in_any_number_of_processes(view, num_workers):
    wanted = data(epochs=1)
    alone = list(dataset(view, wanted))
    loader = DataLoader(
        dataset(view, wanted),
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context="fork",
    )
    together = list(loader)
    assert [batch["state"] for batch in together] == [batch["state"] for batch in alone]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(one["targets"].entry_ids, other["targets"].entry_ids)


def test_view_dataset_resumes_from_every_state(view):
    wanted = data(micro_batch_size=2)
    first = dataset(view, wanted)
    everything = list(first)
    for number in (0, 1, 2, 7, len(everything) - 2, len(everything) - 1):
        again = pickle.loads(pickle.dumps(dataset(view, wanted)))
        again.load_state_dict(everything[number]["state"])
        rest = list(again)
        assert [b["state"] for b in rest] == [b["state"] for b in everything[number + 1 :]]
        assert all(
            torch.equal(a["input_ids"], b["input_ids"])
            for a, b in zip(rest, everything[number + 1 :], strict=True)
        )
    steps = data(epochs=None, steps=9)
    half = list(dataset(view, steps))[:13]
    rest_of_it = dataset(view, steps)
    rest_of_it.load_state_dict(half[-1]["state"])
    assert len(list(rest_of_it)) == 9 * 3 - 13


def test_view_dataset_resumes_on_other_ranks(view):
    wanted = data()
    state = list(dataset(view, wanted))[3 * 4 - 1]["state"]  # after four whole steps
    rest = [dataset(view, wanted, rank, 2) for rank in range(2)]
    for one in rest:
        one.load_state_dict(state)
    expected = list(dataset(view, wanted))[3 * 4 :]
    lanes = [list(one) for one in rest]
    # Rank 0 has lanes 0 and 2, rank 1 lane 1 and a micro-batch that weighs nothing.
    for number, batch in enumerate(expected):
        step, lane = divmod(number, 3)
        found = lanes[lane % 2][2 * step + lane // 2]
        assert torch.equal(found["input_ids"], batch["input_ids"])
    within = list(dataset(view, wanted))[3 * 4]["state"]
    with pytest.raises(ConfigError, match=r"within step 5 .* world_size = 1, but here it is 2"):
        rest[0].load_state_dict(within)


def test_state_dict_follows_the_iteration_and_refuses_where_it_cannot(view):
    here = dataset(view, data())
    beginning = here.state_dict()
    batches = iter(here)
    for _ in range(5):
        batch = next(batches)
    assert here.state_dict() == batch["state"] != beginning
    elsewhere = dataset(view, data(epochs=1))
    list(DataLoader(elsewhere, batch_size=None, num_workers=1, multiprocessing_context="fork"))
    with pytest.raises(ConfigError, match=r'keep batch\["state"\]'):
        elsewhere.state_dict()


def test_view_dataset_refuses_what_does_not_fit(view):
    good = dataset(view, data())
    with pytest.raises(ConfigError, match=r"seed = 0, but here it is 1; .*same data\.seed"):
        dataset(view, data(seed=1)).load_state_dict(good.state_dict())
    with pytest.raises(ConfigError, match=r"rank = 2 with world_size = 2"):
        dataset(view, data(), 2, 2)
    with pytest.raises(ConfigError, match=r"loss\.temperature"):
        ViewDataset(view.url, data(), LossConfig(kind="ghost", temperature=3.0), 40, None)
    other = {**VOCABULARY, "t1": 2, "t2": 1}
    with pytest.raises(VocabularyError, match="differs"):
        ViewDataset(view.url, data(), LOSS, 40, Words(other))


def test_public_names_are_there_and_the_package_stays_light():
    code = (
        "import sys, trainer, trainer.config.train\n"
        "heavy = {'torch', 'ray', 'vllm', 'transformers', 'deepspeed', 'pyarrow'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    for name in trainer.__all__:
        assert name in dir(trainer)
        assert getattr(trainer, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'DistilationHead'"):
        _ = trainer.DistilationHead
