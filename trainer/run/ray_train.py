"""Ray for a training run: a connection to it, and a Ray Train trainer that is set up with care.

The shims for Ray's own behaviour are here, each with the condition for its removal.
"""

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from schemas.errors import ConfigError
from schemas.storage.store import Store
from trainer.config.train import RayConfig, TrainConfig

START_ATTEMPTS = 10
"""Times that Ray Train tries to place the workers; each waits a minute for nodes. Its default is to
try for ever."""

RAY_NOTES = "ray"
"""Folder in the run's for what Ray Train writes; ours is beside it."""

IDLE_CALLBACKS = ("PlacementGroupCleanerCallback", "DatasetsCallback")
"""Parts of Ray Train 2.60 that a run on this machine alone is better without. The cleaner asks the
dashboard, which a Ray of our own does not have, and so delays the end of every run by 12 seconds;
what it would clean up goes with the local Ray anyway. The other starts a process for data sets,
of which there are none. Can go when Ray starts neither without need."""


@contextlib.contextmanager
def ray_cluster(config: RayConfig, say: Callable[[str], None]) -> Iterator[None]:
    """A connection to Ray: the one that is there, the cluster's, or an instance of this machine.

    Args:
        config: where the workers run.
        say: shows a line to the person who waits.

    Raises:
        ConfigError: the cluster is not there, or this machine is too small for the workers.
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
        if started:
            ray.shutdown()


def make_trainer(config: TrainConfig, worker: Callable[[Any], None], job: Any, store: Store) -> Any:
    """A Ray Train trainer that runs ``worker(job)`` on every rank.

    Args:
        store: the run's folder, where Ray Train keeps notes of its own meanwhile.
    """
    from pyarrow.fs import FSSpecHandler, PyFileSystem
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    is_local = not _address(config.ray)
    notes = store.path(RAY_NOTES)

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks: list[Any] = super()._create_default_callbacks()
            idle = IDLE_CALLBACKS if is_local else ()
            return [callback for callback in callbacks if type(callback).__name__ not in idle]

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
            num_workers=_scale(config.ray),
            use_gpu=config.ray.use_gpu,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=config.ray.resize_check_s,
        ),
        run_config=RunConfig(
            # Ray restores a run of a name that it knows; checkpoints here are our own.
            name=f"train-{uuid.uuid4().hex[:12]}",
            storage_path=os.path.abspath(notes) if store.is_local else notes,
            storage_filesystem=None if store.is_local else PyFileSystem(FSSpecHandler(store.fs)),
            failure_config=FailureConfig(
                max_failures=config.ray.max_failures,
                controller_failure_limit=START_ATTEMPTS,
            ),
        ),
    )


def _scale(config: RayConfig) -> int | tuple[int, int]:
    if config.min_workers == config.max_workers:
        return config.max_workers
    return config.min_workers, config.max_workers


def _address(config: RayConfig) -> str:
    return config.address or os.environ.get("RAY_ADDRESS", "")


def _connect(config: RayConfig) -> None:
    import ray

    address = _address(config)
    if not address:
        # One actor less to wait for: nobody takes this machine away on short notice.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    local: dict[str, Any] = {"address": "local", "include_dashboard": False}
    try:
        ray.init(
            **({"address": address} if address else local),
            log_to_driver=False,
            logging_level="ERROR",
        )
    except Exception as error:  # Ray raises plain exceptions, too
        reason = " ".join(str(error).split())[:200]
        where = f"at {address}" if address else "on this machine"
        raise ConfigError(
            f"no Ray cluster {where} ({reason}); look whether it is up and reachable. Without "
            "ray.address and RAY_ADDRESS one is started on this machine"
        ) from error


def _missing_resources(config: RayConfig, there: dict[str, float]) -> str:
    """What the workers need and the cluster does not have; empty where it has everything."""
    wanted = {"CPU": config.min_workers * config.cpus_per_worker}
    if config.use_gpu:
        wanted["GPU"] = config.min_workers
    for name, number in wanted.items():
        if there.get(name, 0) < number:
            return (
                f"ray.num_workers = {config.min_workers} need {number} {name}s, but there are "
                f"{there.get(name, 0):g}"
            )
    return ""
