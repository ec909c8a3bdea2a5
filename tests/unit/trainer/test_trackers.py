"""Trackers that are asked for have to be there before anything starts."""

import importlib.util
from pathlib import Path

import pytest
from training_runs import make_config

from schemas.errors import ConfigError
from trainer.launch import run_train_job
from trainer.trackers import Trackers


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


class Away:
    """A tracker whose server goes away."""

    NAME = "Away"

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, values: dict[str, float], step: int) -> None:
        if step == 2:
            raise ConnectionError("no route")
        self.steps.append(step)

    def close(self) -> None:
        raise ConnectionError("no route")


def test_a_tracker_that_fails_is_left_and_said_to_be() -> None:
    away = Away()
    trackers = Trackers([away])
    said = [trackers.log({"train/loss": 1.0}, step) for step in (1, 2, 3)]
    assert said[0] == said[2] == []
    assert "Away gets no more points from step 2 on (no route)" in said[1][0]
    assert away.steps == [1]
    Trackers([away]).close()
