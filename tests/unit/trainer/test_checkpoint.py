"""Which checkpoints are trusted, and that a save that dies leaves none that should not be."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from schemas.errors import ConfigError
from trainer import checkpoint
from trainer.checkpoint import TrainProgress, find_checkpoint, load_checkpoint, save_checkpoint
from trainer.plan import LoaderState


@pytest.fixture(autouse=True)
def _one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rank", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Engine:
    """The parts of a DeepSpeed engine that checkpoints touch, around one weight."""

    def __init__(self, value: float = 0.0) -> None:
        self.weight = torch.nn.Parameter(torch.tensor([value]))
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.1)

    def save_checkpoint(self, root: str, tag: str, save_latest: bool) -> None:
        folder = Path(root) / tag
        folder.mkdir(parents=True)
        torch.save(self.weight.detach(), folder / "weights.pt")

    def load_checkpoint(self, root: str, tag: str, load_lr_scheduler_states: bool) -> None:
        self.weight.data = torch.load(Path(root) / tag / "weights.pt")


def progress(step: int) -> TrainProgress:
    return TrainProgress(
        step=step,
        loader=LoaderState(view_hash="v", seed=0, epoch=0, step=step),
        tokens=10 * step,
        labels=9 * step,
        final_loss=0.1 + step / 3,
        pending={"loss": 1 / 3},
    )


def save(root: Path, *steps: int, keep: int = 10) -> None:
    for step in steps:
        save_checkpoint(Engine(float(step)), root, progress(step), ["fingerprint"], keep)


def test_the_newest_is_found_and_brought_back_exactly(tmp_path: Path) -> None:
    save(tmp_path, 5, 10)
    torch.manual_seed(7)
    save(tmp_path, 15)
    expected = torch.rand(3)
    folder, manifest, passed_over = find_checkpoint(tmp_path)
    assert folder is not None
    assert manifest is not None
    assert folder.name == "step_15"
    assert not passed_over
    assert manifest.progress == progress(15)
    engine = Engine()
    load_checkpoint(engine, folder, manifest)
    assert engine.weight.item() == 15.0
    assert torch.equal(torch.rand(3), expected)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 5, 10, 15, keep=2)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_10", "step_15"]


def test_nothing_there(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "none") == (None, None, [])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: f.unlink(), "missing"),
        (lambda f: f.write_bytes(f.read_bytes()[:-1]), "bytes, expected"),
        (lambda f: f.write_bytes(f.read_bytes()[:-1] + b"!"), "damaged"),
    ],
)
def test_damage_is_passed_over_and_said(tmp_path: Path, damage: Any, reason: str) -> None:
    save(tmp_path, 5, 10)
    damage(tmp_path / "step_10" / "weights.pt")
    folder, _, passed_over = find_checkpoint(tmp_path)
    assert folder is not None
    assert folder.name == "step_5"
    assert len(passed_over) == 1
    assert reason in passed_over[0]


def test_a_torn_manifest_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 5, 10)
    manifest = tmp_path / "step_10" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:50])
    folder, _, passed_over = find_checkpoint(tmp_path)
    assert folder is not None
    assert folder.name == "step_5"
    assert "not readable" in passed_over[0]


@pytest.mark.parametrize("dies_in", ["_random_state", "_describe", "write_atomic"])
def test_a_save_that_dies_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_in: str
) -> None:
    save(tmp_path, 5)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, dies_in, die)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 10)
    folder, _, passed_over = find_checkpoint(tmp_path)
    assert folder is not None
    assert folder.name == "step_5"
    assert "not finished" in passed_over[0]
    save(tmp_path, 10)  # what was left does not stand in the way
    folder, _, passed_over = find_checkpoint(tmp_path)
    assert folder is not None
    assert folder.name == "step_10"
    assert not passed_over


def test_another_number_of_workers_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 5)
    folder, manifest, _ = find_checkpoint(tmp_path)
    assert folder is not None
    assert manifest is not None
    with pytest.raises(ConfigError, match="saved by 4 workers"):
        load_checkpoint(Engine(), folder, manifest.model_copy(update={"world_size": 4}))


def test_hyperparameters_are_the_configurations(tmp_path: Path) -> None:
    save(tmp_path, 5)
    folder, manifest, _ = find_checkpoint(tmp_path)
    assert folder is not None
    assert manifest is not None
    engine = Engine()
    engine.optimizer.param_groups[0]["weight_decay"] = 0.25
    load_checkpoint(engine, folder, manifest)
    assert engine.optimizer.param_groups[0]["weight_decay"] == 0.25
