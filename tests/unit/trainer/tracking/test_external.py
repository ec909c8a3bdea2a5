"""Configured trackers must be installed before anything starts."""

import importlib.util
from pathlib import Path

import pytest

from schemas.errors import ConfigError
from tests.support.training_runs import make_config
from trainer.run.launch import run_train_job
from trainer.tracking.external import Trackers, _run_id


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


def test_a_run_is_found_again_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_id(run: str) -> str:
        config = make_config(Path("run"), "view", "tokenizer")
        return _run_id(config.model_copy(update={"run": run}))

    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        urls = ("s3://bucket/run", "s3://bucket/run/", "s3://bucket/other")
        found.append([run_id(run) for run in (*urls, str(tmp_path / "run"), "run")])
    one, two = found
    assert one[0] == one[1] != one[2]
    assert one[:4] == two[:4]
    assert one[4] != two[4]  # two runs, each in its own folder


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
    assert "Away failed at step 2 and gets no more points (no route)" in said[1][0]
    assert away.steps == [1]
    Trackers([away]).close()
