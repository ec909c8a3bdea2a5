"""Experiment trackers beside metrics.jsonl: Weights & Biases and MLflow, where installed."""

import contextlib
import hashlib
import importlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from schemas.errors import ConfigError, first_line
from trainer.config.train import LogConfig, TrainConfig

_KEYS = {"wandb": "wandb_project", "mlflow": "mlflow_uri"}
_INSTALL = {"wandb": "pip install wandb", "mlflow": "pip install mlflow-skinny"}


class Tracker(Protocol):
    """An external service that receives the points of the learning curve."""

    NAME: str

    def log(self, values: dict[str, float], step: int) -> None:
        """Logs the values of a step; a resumed run may log a step twice."""

    def close(self) -> None:
        """Ends the tracker's run."""


def check_trackers(config: LogConfig) -> None:
    """Checks that the configured trackers' packages are installed, without importing them.

    Raises:
        ConfigError: a package is missing; names the install command.
    """
    for package in _configured(config):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"log.{_KEYS[package]} is set, but the package {package} is not installed here; "
                f"{_INSTALL[package]}, or remove the key"
            )


def open_trackers(config: TrainConfig) -> list[Tracker]:
    """Opens the configured trackers.

    Raises:
        ConfigError: a package is not installed on this node, or the tracker rejects the run.
    """
    check_trackers(config.log)
    trackers: list[Tracker] = []
    for package in _configured(config.log):
        try:
            trackers.append(_WandbRun(config) if package == "wandb" else _MlflowRun(config))
        except Exception as error:  # these packages document no base class of their errors
            raise ConfigError(
                f"log.{_KEYS[package]}: {package} cannot be used: {first_line(error)}"
            ) from error
    return trackers


class Trackers:
    """Several trackers. One that fails during training is dropped with a warning."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)

    def log(self, values: dict[str, float], step: int) -> list[str]:
        """Logs the values of a step. Returns a line for each tracker that failed."""
        problems = []
        for tracker in list(self._trackers):
            try:
                tracker.log(values, step)
            except Exception as error:  # noqa: BLE001  (an unreachable server must not end a run)
                self._trackers.remove(tracker)
                problems.append(
                    f"{tracker.NAME} failed at step {step} and receives no more points "
                    f"({first_line(error)}); metrics.jsonl has all of them"
                )
        return problems

    def close(self) -> None:
        """Ends the trackers' runs."""
        for tracker in self._trackers:
            with contextlib.suppress(Exception):  # metrics.jsonl has every point
                tracker.close()


def _configured(config: LogConfig) -> list[str]:
    return [package for package, key in _KEYS.items() if getattr(config, key)]


def _run_id(config: TrainConfig) -> str:
    """An id that stays the same when a run is resumed, from any working directory."""
    run = config.run if "://" in config.run else os.path.abspath(config.run)
    return hashlib.sha256(run.rstrip("/").encode()).hexdigest()[:16]


class _WandbRun:
    """A Weights & Biases run; honours WANDB_MODE and the other WANDB variables."""

    NAME = "Weights & Biases"

    def __init__(self, config: TrainConfig) -> None:
        wandb: Any = importlib.import_module("wandb")
        folder = Path(config.run)
        self._run = wandb.init(
            project=config.log.wandb_project,
            name=folder.name,
            id=_run_id(config),
            resume="allow",  # continues the run of this id if it exists
            dir=str(folder) if folder.is_dir() else None,
            config=config.model_dump(mode="json"),
        )
        # Our own metric as the x axis: wandb's step cannot decrease, as it does after a resume.
        self._run.define_metric("*", step_metric="step")

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


class _MlflowRun:
    """An MLflow run, found by its tag when training resumes."""

    NAME = "MLflow"
    EXPERIMENT = "tutelage"
    TAG = "tutelage.run"

    def __init__(self, config: TrainConfig) -> None:
        mlflow: Any = importlib.import_module("mlflow")
        self._client = mlflow.tracking.MlflowClient(tracking_uri=config.log.mlflow_uri)
        found = self._client.get_experiment_by_name(self.EXPERIMENT)
        experiment = (
            self._client.create_experiment(self.EXPERIMENT)
            if found is None
            else found.experiment_id
        )
        identity = _run_id(config)
        runs = self._client.search_runs([experiment], f"tags.`{self.TAG}` = '{identity}'")
        run = (
            runs[0]
            if runs
            else self._client.create_run(
                experiment, tags={self.TAG: identity}, run_name=Path(config.run).name
            )
        )
        self._run_id = run.info.run_id
        if not runs:
            self._client.log_dict(self._run_id, config.model_dump(mode="json"), "config.json")

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run_id, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)
