"""Experiment trackers: found before anything starts, resumed with the run, dropped on failure."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import ConfigError
from tests.support.tracker_stand_ins import make_mlflow, make_wandb
from tests.support.training_runs import make_config
from trainer.config.train import TrainConfig
from trainer.run.launch import run_train_job
from trainer.tracking.external import Trackers, _run_id, open_trackers


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    return install(monkeypatch, make_wandb())


@pytest.fixture(params=["stand-in", "package"])
def mlflow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "package":
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        return pytest.importorskip("mlflow")
    return install(monkeypatch, make_mlflow())


def install(monkeypatch: pytest.MonkeyPatch, module: Any) -> Any:
    module.__spec__ = ModuleSpec(module.__name__, None)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.parametrize(
    ("package", "key", "command"),
    [
        ("wandb", "wandb_project", "pip install wandb"),
        ("mlflow", "mlflow_uri", "pip install mlflow-skinny"),
    ],
)
def test_missing_package_names_its_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, key: str, command: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = make_config(tmp_path / "run", "no view", "no tokenizer", log={key: "file:x"})
    with pytest.raises(ConfigError, match=rf"log\.{key} is set.*{command}"):
        run_train_job(config, progress=False)


def log_interrupted_run(config: TrainConfig) -> None:
    """Three steps, and from the second on again, as a run that was resumed there logs them."""
    for steps in ((1, 2, 3), (2, 3)):
        (tracker,) = open_trackers(config)
        for step in steps:
            tracker.log({"train/loss": 1.0 / step}, step)
        tracker.close()


def test_wandb_run_is_resumed_with_its_own_step_axis(tmp_path: Path, wandb: Any) -> None:
    config = make_config(tmp_path / "run", "v", "t", log={"wandb_project": "mine"})
    (tmp_path / "run").mkdir()
    log_interrupted_run(config)
    first, second = wandb.runs
    assert first.options == second.options
    assert first.options["project"] == "mine"
    assert first.options["name"] == "run"
    assert first.options["resume"] == "allow"
    assert first.options["dir"] == str(tmp_path / "run")
    assert first.options["config"]["optimizer"]["lr"] == 1e-2
    assert first.metrics == [("*", "step")]
    assert second.rows == [{"train/loss": 1 / 2, "step": 2}, {"train/loss": 1 / 3, "step": 3}]
    assert first.is_finished
    assert second.is_finished


def test_wandb_package_takes_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "run").mkdir()
    log_interrupted_run(make_config(tmp_path / "run", "v", "t", log={"wandb_project": "mine"}))
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))) == 2


def test_mlflow_run_is_found_again_and_gets_every_point(tmp_path: Path, mlflow: Any) -> None:
    uri = f"file:{tmp_path}/mlflow"
    log_interrupted_run(make_config(tmp_path / "other", "v", "t", log={"mlflow_uri": uri}))
    log_interrupted_run(make_config(tmp_path / "run", "v", "t", log={"mlflow_uri": uri}))
    client = mlflow.tracking.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tutelage").experiment_id
    runs = client.search_runs([experiment])
    assert sorted(run.info.run_name for run in runs) == ["other", "run"]
    for run in runs:
        assert run.info.status == "FINISHED"
        points = client.get_metric_history(run.info.run_id, "train/loss")
        assert [(point.step, point.value) for point in points] == [
            (step, 1.0 / step) for step in (1, 2, 3, 2, 3)
        ]
        assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["config.json"]


def test_tracker_that_refuses_the_run_is_a_config_error(
    tmp_path: Path, wandb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("no API key\nwandb: log in first")

    monkeypatch.setattr(wandb, "init", refuse)
    config = make_config(tmp_path / "run", "v", "t", log={"wandb_project": "mine"})
    with pytest.raises(ConfigError, match=r"log\.wandb_project: .*no API key$"):
        open_trackers(config)


def test_run_id_is_the_same_from_another_folder(
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


def test_failing_tracker_is_dropped_with_a_warning() -> None:
    away = Away()
    trackers = Trackers([away])
    said = [trackers.log({"train/loss": 1.0}, step) for step in (1, 2, 3)]
    assert said[0] == said[2] == []
    assert "Away failed at step 2 and receives no more points (no route)" in said[1][0]
    assert away.steps == [1]
    Trackers([away]).close()
