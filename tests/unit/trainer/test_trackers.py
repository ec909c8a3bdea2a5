"""Trackers that are asked for have to be there before anything starts."""

import importlib.util
from pathlib import Path

import pytest
from training_runs import make_config

from schemas.errors import ConfigError
from trainer.launch import run_train_job


@pytest.mark.parametrize(
    ("package", "key", "command"),
    [
        ("wandb", "wandb_project", "pip install wandb"),
        ("mlflow", "mlflow_uri", "pip install mlflow-skinny"),
    ],
)
def test_a_missing_package_names_its_install_command(
    tmp_path: Path, package: str, key: str, command: str
) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    config = make_config(tmp_path / "run", "no view", "no tokenizer", log={key: "file:x"})
    with pytest.raises(ConfigError, match=rf"log\.{key} is set.*{command}"):
        run_train_job(config, progress=False)
