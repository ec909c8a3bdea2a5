"""In-memory stand-ins for the parts of wandb and MLflow that the trainer calls.

The packages themselves are no dependency: wandb brings a 20 MB service, and mlflow-skinny needs
older versions of what the pinned dependencies contain. Where one is installed, the tests that use
these stand-ins also run on the package.
"""

import itertools
from types import ModuleType, SimpleNamespace
from typing import Any


class WandbRun:
    """What ``wandb.init`` returns."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.metrics: list[tuple[str, str]] = []
        self.rows: list[dict[str, float]] = []
        self.is_finished = False

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, row: dict[str, float]) -> None:
        assert not self.is_finished
        self.rows.append(row)

    def finish(self) -> None:
        self.is_finished = True


def make_wandb() -> Any:
    """The module; ``runs`` has every run that was opened."""
    module: Any = ModuleType("wandb")
    module.runs = []

    def init(**options: Any) -> WandbRun:
        assert options.keys() == {"project", "name", "id", "resume", "dir", "config"}
        module.runs.append(WandbRun(**options))
        return module.runs[-1]

    module.init = init
    return module


class MlflowServer:
    """Experiments and runs, which outlive the clients that make them."""

    def __init__(self) -> None:
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, Any] = {}
        self.numbers = map(str, itertools.count())


class MlflowClient:
    """A client, with MLflow's own names; it can also read back, as MLflow's can."""

    def __init__(self, server: MlflowServer) -> None:
        self._server = server

    def get_experiment_by_name(self, name: str) -> Any:
        found = self._server.experiments.get(name)
        return None if found is None else SimpleNamespace(experiment_id=found)

    def create_experiment(self, name: str) -> str:
        assert name not in self._server.experiments
        return self._server.experiments.setdefault(name, next(self._server.numbers))

    def search_runs(self, experiment_ids: list[str], filter_string: str = "") -> list[Any]:
        key, _, value = filter_string.removeprefix("tags.`").partition("` = ")
        return [
            run
            for run in self._server.runs.values()
            if run.info.experiment_id in experiment_ids
            and (not filter_string or run.data.tags.get(key) == value.strip("'"))
        ]

    def create_run(self, experiment_id: str, tags: dict[str, str], run_name: str) -> Any:
        info = SimpleNamespace(
            run_id=f"run-{next(self._server.numbers)}",
            run_name=run_name,
            experiment_id=experiment_id,
            status="RUNNING",
        )
        data = SimpleNamespace(tags=dict(tags), metrics=[], artifacts={})
        return self._server.runs.setdefault(info.run_id, SimpleNamespace(info=info, data=data))

    def log_dict(self, run_id: str, content: dict[str, Any], artifact_file: str) -> None:
        self._server.runs[run_id].data.artifacts[artifact_file] = content

    def log_metric(self, run_id: str, key: str, value: float, step: int) -> None:
        metric = SimpleNamespace(key=key, value=value, step=step)
        self._server.runs[run_id].data.metrics.append(metric)

    def set_terminated(self, run_id: str) -> None:
        self._server.runs[run_id].info.status = "FINISHED"

    def list_artifacts(self, run_id: str) -> list[Any]:
        return [SimpleNamespace(path=name) for name in self._server.runs[run_id].data.artifacts]

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        return [one for one in self._server.runs[run_id].data.metrics if one.key == key]


def make_mlflow() -> Any:
    """The module; one server for each ``tracking_uri``."""
    module: Any = ModuleType("mlflow")
    servers: dict[str, MlflowServer] = {}

    def client(tracking_uri: str) -> MlflowClient:
        return MlflowClient(servers.setdefault(tracking_uri, MlflowServer()))

    module.tracking = SimpleNamespace(MlflowClient=client)
    return module
