"""Ray for a label job: the session, settings of Ray Data, facts about nodes, errors for users."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from labeler.config import RunConfig
from schemas.errors import ConfigError, TeacherError, TutelageError, first_line

_UDF_NOTE = "\nFailed to apply UDF"  # start of the advice that Ray Data appends to messages


@contextmanager
def ray_session(run: RunConfig) -> Iterator[None]:
    """Uses a running Ray, connects to the address, or starts a local Ray and stops it afterwards.

    Raises:
        ConfigError: no cluster answers at the address.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address = run.address or os.environ.get("RAY_ADDRESS", "")
    try:
        ray.init(**(_connect_options(address) if address else _local_options(run)))
    except ConnectionError as error:
        raise ConfigError(
            f"no Ray cluster answers at {address}: {first_line(error)}; correct "
            "run.address or RAY_ADDRESS, or leave both empty to start one here"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _connect_options(address: str) -> dict[str, Any]:
    return {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}


def _local_options(run: RunConfig) -> dict[str, Any]:
    # At lower levels the C++ core prints advice about Ray Data's own actors to the terminal.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    packages = str(Path(__file__).resolve().parents[3])
    known = os.environ.get("PYTHONPATH", "")
    return {
        "address": "local",
        "num_cpus": run.num_cpus,
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {
            "env_vars": {"PYTHONPATH": f"{packages}{os.pathsep}{known}" if known else packages}
        },
    }


def cluster_size() -> tuple[list[float], list[float]]:
    """Returns the CPUs and the GPUs of each live node that has either, in the same order."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [(float(node.get("CPU", 0.0)), float(node.get("GPU", 0.0))) for node in alive]
    nodes = [node for node in nodes if any(node)]
    return [cpus for cpus, _ in nodes], [gpus for _, gpus in nodes]


def this_node() -> str:
    """Ray's id of this process's node."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def this_actor() -> str:
    """Ray's id of this process's actor; survives a restart."""
    import ray

    return str(ray.get_runtime_context().get_actor_id())


def was_restarted() -> bool:
    """Whether an earlier process of this actor crashed."""
    import ray

    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def is_lost_node(name: str) -> bool:
    """Whether a node has left the cluster."""
    import ray

    return name not in {node["NodeID"] for node in ray.nodes() if node["Alive"]}


@contextmanager
def quiet_ray_data(block_bytes: int, waiting_bytes: int) -> Iterator[None]:
    """Configures Ray Data for one job: original errors are raised, nothing is printed.

    Args:
        block_bytes: target size of a block.
        waiting_bytes: total size of queued blocks beyond which tasks pause.
    """
    import ray.data

    settings = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "raise_original_map_exception": True,
        "target_max_block_size": block_bytes,
    }
    context = ray.data.DataContext.get_current()
    before = {name: getattr(context, name) for name in settings}
    # Disabled: detectors only give advice, and the high-memory one calls ray_remote_args_fn for
    # actors that never start, which would create placement groups.
    detectors = context.issue_detectors_config.detectors
    options = context.execution_options
    limits = options.resource_limits
    logger = logging.getLogger("ray.data")
    handlers = list(logger.handlers)
    try:
        for name, value in settings.items():
            setattr(context, name, value)
        context.issue_detectors_config.detectors = []
        options.resource_limits = limits.copy(object_store_memory=waiting_bytes)
        for handler in handlers:  # keep the log file in the session folder
            if not hasattr(handler, "baseFilename") and "File" not in type(handler).__name__:
                logger.removeHandler(handler)
        with warnings.catch_warnings():
            # map_batches has no named parameters for restarts and retries; remove once it does.
            warnings.filterwarnings("ignore", message=".*ray_remote_args")
            yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        context.issue_detectors_config.detectors = detectors
        options.resource_limits = limits
        logger.handlers[:] = handlers


@contextmanager
def errors_for_users() -> Iterator[None]:
    """Replaces a Ray exception with the one-line error behind it, if it is known."""
    try:
        yield
    except Exception as error:
        known = user_error(error)
        if known is None:
            raise
        raise known from None


def user_error(error: BaseException) -> TutelageError | None:
    """The one-line error behind an exception of Ray; None if it is a bug of this project."""
    import ray.exceptions

    found: BaseException | None = error
    while found is not None:
        if isinstance(found, TutelageError) and not isinstance(found, ray.exceptions.RayError):
            return type(found)(str(found).split(_UDF_NOTE)[0])
        found = getattr(found, "cause", None) or found.__cause__
    crashes = (
        ray.exceptions.RayActorError,
        ray.exceptions.WorkerCrashedError,
        ray.exceptions.OutOfMemoryError,
        ray.exceptions.ObjectLostError,
    )
    if isinstance(error, crashes) and not isinstance(error, ray.exceptions.RayTaskError):
        return TeacherError(
            f"a process of the job crashed and has no retries left ({first_line(error)}), often "
            "because the system killed it for memory: see `dmesg` and Ray's logs. Committed units "
            "are kept: run the same command again to resume"
        )
    return None
