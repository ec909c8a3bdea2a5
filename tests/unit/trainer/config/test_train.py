"""The model behind train.toml: what it refuses, and that it is written out completely."""

from pathlib import Path
from typing import Any

import pytest

from schemas.config import dump_toml, load_toml
from schemas.errors import ConfigError
from trainer.config.train import TrainConfig

MINIMAL = """
run = "runs/x"
view = "runs/v"
[student]
path = "models/small"
[data]
max_tokens = 128
sequences_per_step = 8
epochs = 1
"""


def load(tmp_path: Path, *overrides: str, text: str = MINIMAL) -> TrainConfig:
    path = tmp_path / "train.toml"
    path.write_text(text)
    return load_toml(str(path), TrainConfig, overrides)


def test_minimal_file_is_a_complete_run(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.loss.kind == "forward_kl"
    assert config.data.epochs == 1
    assert config.data.steps is None


def test_written_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load(tmp_path, "optimizer.betas=[0.8, 0.99]", "deepspeed.native.zero_optimization.x=1")
    assert load(tmp_path, text=dump_toml(config)) == config


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["data.steps=5"], "data.steps"),
        (["student.config.model_type=llama"], "student.config"),
        (["student.path="], "student.path"),
        (["loss.kind=hard", "loss.temperature=2.0"], "loss.temperature"),
        (["loss.alpha=1.5"], "loss.alpha"),
        (["loss.kind=jsd", "loss.beta=1.0"], "loss.beta"),
        (["loss.kind=skew_kl", "loss.beta=0.3"], "loss.beta"),
        (["loss.kind=jsd", "loss.skew=0.3"], "loss.skew"),
        (["loss.skew=0.3"], "loss.skew"),
        (["schedule.warmup_steps=3", "schedule.warmup_ratio=0.1"], "schedule.warmup_ratio"),
        (["deepspeed.zero_stage=4"], "deepspeed.zero_stage"),
        (["data.sequence_per_step=4"], "sequences_per_step"),
    ],
)
def test_config_names_a_wrong_value(tmp_path: Path, overrides: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load(tmp_path, *overrides)


@pytest.mark.parametrize(("kind", "field"), [("jsd", "beta"), ("skew_kl", "skew")])
def test_config_refuses_fields_of_another_divergence(tmp_path: Path, kind: str, field: str) -> None:
    config = load(tmp_path, f"loss.kind={kind}", f"loss.{field}=0.3")
    assert getattr(config.loss, field) == 0.3
    assert load(tmp_path, text=dump_toml(config)) == config


def test_student_from_a_config_needs_a_tokenizer(tmp_path: Path) -> None:
    text = MINIMAL.replace('path = "models/small"', 'config = {model_type = "llama"}')
    with pytest.raises(ConfigError, match=r"student\.tokenizer"):
        load(tmp_path, text=text)
    assert load(tmp_path, 'student.tokenizer="models/t"', text=text).student.path == ""


def test_configurations_cannot_be_changed() -> None:
    fields: dict[str, Any] = {"max_tokens": 8, "sequences_per_step": 1, "steps": 1}
    config = TrainConfig.model_validate(
        {"run": "r", "view": "v", "student": {"path": "p"}, "data": fields}
    )
    with pytest.raises(ValueError, match="frozen"):
        config.run = "other"  # type: ignore[misc]


def test_best_by_a_held_out_metric_needs_an_evaluation(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"best_metric = \"eval_ce\" needs \[eval\], which is missing"
    ):
        load(tmp_path, "checkpoint.best_metric=eval_ce")
    load(tmp_path, "checkpoint.best_metric=eval_ce", "eval.view=v")
    with pytest.raises(ConfigError, match=r"checkpoint\.best_metric: expected 'loss', 'ce'"):
        load(tmp_path, "checkpoint.best_metric=lost")
