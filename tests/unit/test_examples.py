"""Every shipped TOML is a valid, complete run."""

from pathlib import Path

import pytest

from labeler.config import LabelConfig
from schemas.config import StrictModel, dump_toml, load_toml
from tests.support import ROOT
from trainer.config.evaluate import EvaluateConfig
from trainer.config.train import TrainConfig

SHIPPED = sorted((ROOT / "examples").rglob("*.toml"))


def model_of(path: Path) -> type[StrictModel]:
    if path.stem.startswith("train"):
        return TrainConfig
    return EvaluateConfig if path.stem.startswith("evaluate") else LabelConfig


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_example_loads_and_survives_being_written(path: Path, tmp_path: Path) -> None:
    config = load_toml(str(path), model_of(path))
    again = tmp_path / "again.toml"
    again.write_text(dump_toml(config))
    assert load_toml(str(again), model_of(path)) == config


def test_demo_has_the_configs_that_it_runs() -> None:
    demo = {path.stem for path in SHIPPED if path.parent.name == "demo"}
    assert demo == {"label", "generate", "train_kd", "train_ce", "evaluate"}


def test_demo_students_differ_in_their_loss_alone() -> None:
    kd, ce = (
        load_toml(str(ROOT / "examples" / "demo" / f"train_{name}.toml"), TrainConfig).model_dump()
        for name in ("kd", "ce")
    )
    assert {key for key in kd if kd[key] != ce[key]} == {"run", "loss"}
