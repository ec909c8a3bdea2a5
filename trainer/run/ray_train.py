"""Runs the workers of a training run on Ray Train.

All workarounds for Ray are in this module, each with the condition for its removal.
"""

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from schemas.console.progress import Progress
from schemas.errors import ConfigError, StudentError, first_line
from schemas.storage.store import Store
from trainer.config.train import RayConfig, TrainConfig
from trainer.run_folder import RunFolder

START_ATTEMPTS = 10
"""Attempts to place the workers, one minute each; Ray Train retries forever by default."""

RAY_FILES = "ray"
"""Subfolder of the run for Ray Train's own files; deleted at the end."""

IDLE_CALLBACKS = ("PlacementGroupCleanerCallback", "DatasetsCallback")
"""Callbacks of Ray Train 2.60 that a local run omits. The cleaner queries the dashboard, which a
local Ray lacks, and so delays the end of every run by 12 seconds; placement groups end with the
local Ray anyway. The other starts a process for Ray Data, which is not used. Remove when Ray starts
both only on demand."""


def train_on_ray(
    config: TrainConfig, folder: RunFolder, view_hash: str, num_steps: int, progress: Progress
) -> None:
    """Runs all workers to completion; Ray Train restarts them if one is lost.

    Raises:
        TutelageError: the first error of a worker; other exceptions become a StudentError.
    """
    from ray.exceptions import RayError

    from trainer.run.status import RunStatusActor, shown
    from trainer.run.worker import TrainJob, train_worker

    with _connected(config.ray, progress.say):
        status = RunStatusActor()
        job = TrainJob(config, os.getcwd(), folder.claim(), view_hash, num_steps, status)
        try:
            with shown(status, progress):
                failure = _fit(_make_trainer(config, train_worker, job, folder.store))
            error_of_worker = status.error()
        except RayError as error:
            raise StudentError(f"the Ray cluster was lost: {_unexpected(error, config)}") from error
        finally:
            folder.store.delete(RAY_FILES)
    if error_of_worker is not None:
        raise error_of_worker from failure
    if failure is not None:
        raise StudentError(_unexpected(failure, config)) from failure


def _fit(trainer: Any) -> Exception | None:
    """Runs to completion; returns the error on which Ray Train gave up."""
    from ray.train import TrainingFailedError

    try:
        trainer.fit()
    except TrainingFailedError as error:
        return error
    return None


def _unexpected(failure: Exception, config: TrainConfig) -> str:
    """Summarizes an exception other than TutelageError in one line: the lowest rank's, no trace."""
    causes = getattr(failure, "worker_failures", None) or {0: failure}
    rank, cause = min(causes.items())
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    reason = lines[-1].strip() if lines else type(cause).__name__
    return (
        f"worker {rank} failed: {reason[:500]}. Start {config.run} again to resume from its last "
        "checkpoint; Ray's logs of this session have the traceback"
    )


@contextlib.contextmanager
def _connected(config: RayConfig, say: Callable[[str], None]) -> Iterator[None]:
    """Reuses a Ray connection, or connects to the configured cluster or a new local instance.

    Args:
        config: where the workers run.
        say: shows a line to the user.

    Raises:
        ConfigError: the cluster is unreachable, or this machine is too small for the workers.
    """
    import ray

    started = not ray.is_initialized()
    if started:
        _connect(config)
    try:
        missing = _missing_resources(config, ray.cluster_resources())
        if missing and started and not _address(config):
            raise ConfigError(f"{missing}; lower ray.num_workers or ray.cpus_per_worker")
        if missing:
            say(f"{missing}; waiting for more nodes")
        yield
    finally:
        if started:  # an existing connection belongs to the caller
            ray.shutdown()


def _make_trainer(
    config: TrainConfig, worker: Callable[[Any], None], job: Any, store: Store
) -> Any:
    """Creates a Ray Train trainer that runs ``worker(job)`` on every rank.

    Args:
        store: the run's folder, where Ray Train keeps its own files during the run.
    """
    from pyarrow.fs import FSSpecHandler, PyFileSystem
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    is_local = not _address(config.ray)
    files = store.path(RAY_FILES)

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks: list[Any] = super()._create_default_callbacks()
            idle = IDLE_CALLBACKS if is_local else ()
            return [callback for callback in callbacks if type(callback).__name__ not in idle]

    bounds = config.ray.min_workers, config.ray.max_workers
    resources: dict[str, float] = {"CPU": config.ray.cpus_per_worker}
    if config.ray.use_gpu:
        resources["GPU"] = 1
    return Trainer(
        worker,
        train_loop_config=job,
        torch_config=TorchConfig(
            backend="nccl" if config.ray.use_gpu else "gloo",
            timeout_s=config.deepspeed.timeout_s,
        ),
        scaling_config=ScalingConfig(
            num_workers=bounds if bounds[0] < bounds[1] else bounds[0],
            use_gpu=config.ray.use_gpu,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=config.ray.resize_check_s,
        ),
        run_config=RunConfig(
            # Always a new name: Ray would restore a run with a known name from its own files.
            name=f"train-{uuid.uuid4().hex[:12]}",
            storage_path=os.path.abspath(files) if store.is_local else files,
            storage_filesystem=None if store.is_local else PyFileSystem(FSSpecHandler(store.fs)),
            failure_config=FailureConfig(
                max_failures=config.ray.max_failures,
                controller_failure_limit=START_ATTEMPTS,
            ),
        ),
    )


def _address(config: RayConfig) -> str:
    return config.address or os.environ.get("RAY_ADDRESS", "")


def _connect(config: RayConfig) -> None:
    import ray

    address = _address(config)
    if not address:
        # Saves one actor: a single machine is never preempted node by node.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    local: dict[str, Any] = {"address": "local", "include_dashboard": False}
    try:
        ray.init(
            **({"address": address} if address else local),
            log_to_driver=False,
            logging_level="ERROR",
        )
    except Exception as error:  # Ray's errors have no common base class
        where = f"at {address}" if address else "on this machine"
        raise ConfigError(
            f"no Ray cluster {where} ({first_line(error)}); check that it runs and is reachable, "
            "or unset ray.address and RAY_ADDRESS to start a local one"
        ) from error


def _missing_resources(config: RayConfig, available: dict[str, float]) -> str:
    """Describes the first resource that the cluster lacks; empty if it has enough."""
    needed = {"CPU": config.min_workers * config.cpus_per_worker}
    if config.use_gpu:
        needed["GPU"] = config.min_workers
    for name, number in needed.items():
        found = available.get(name, 0)
        if found < number:
            return f"ray.num_workers = {config.min_workers} needs {number} {name}s, found {found:g}"
    return ""
