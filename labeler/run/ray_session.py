"""Ray, as a label job needs it: one session, quiet, and resources that cannot block each other."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from labeler.config import RunConfig
from schemas.errors import ConfigError, TeacherError, TutelageError, first_line

_UDF_NOTE = "\nFailed to apply UDF"  # Ray Data appends advice of its own to a message


@contextmanager
def ray_session(run: RunConfig) -> Iterator[None]:
    """Uses the Ray that is there, or the one at the address, or starts one here and ends it after.

    Raises:
        ConfigError: Nothing answers at the address.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address = run.address or os.environ.get("RAY_ADDRESS", "")
    try:
        ray.init(**(_joined(address) if address else _started_here(run)))
    except ConnectionError as error:
        raise ConfigError(
            f"no Ray cluster answers at {address}: {first_line(error)}; correct "
            "run.address or RAY_ADDRESS, or leave both empty to start one here"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _joined(address: str) -> dict[str, Any]:
    return {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}


def _started_here(run: RunConfig) -> dict[str, Any]:
    # The C++ core writes advice about Ray Data's own actors to the terminal at lower levels.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    packages = str(Path(__file__).resolve().parents[2])
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
    """CPUs and GPUs of each live node that has any of both, in the same order."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [(float(has.get("CPU", 0.0)), float(has.get("GPU", 0.0))) for has in alive]
    nodes = [node for node in nodes if any(node)]
    return [cpus for cpus, _ in nodes], [gpus for _, gpus in nodes]


def this_node() -> str:
    """The name that Ray gives to the node of this process."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def this_actor() -> str:
    """The name that Ray gives to the actor of this process; a restarted actor keeps it."""
    import ray

    return str(ray.get_runtime_context().get_actor_id())


def was_restarted() -> bool:
    """Whether the actor of this process had another one before, which died."""
    import ray

    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def is_lost_node(name: str) -> bool:
    """Whether a node of the cluster is gone."""
    import ray

    return name not in {node["NodeID"] for node in ray.nodes() if node["Alive"]}


@contextmanager
def quiet_ray_data(block_bytes: int, waiting_bytes: int) -> Iterator[None]:
    """Settings of Ray Data for one job: errors as they were raised, nothing printed.

    Args:
        block_bytes: Of the blocks in which rows travel.
        waiting_bytes: Of all blocks that wait somewhere; tasks pause where there are more.
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
    # One of them asks for the options of actors that are never started, and so for a placement
    # group (ray.data's high memory detector); what all of them have to say is advice.
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
        for handler in handlers:  # its file in the session's folder stays
            if not hasattr(handler, "baseFilename") and "File" not in type(handler).__name__:
                logger.removeHandler(handler)
        with warnings.catch_warnings():
            # map_batches has no named parameter for restarts and retries; goes when it has.
            warnings.filterwarnings("ignore", message=".*ray_remote_args")
            yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        context.issue_detectors_config.detectors = detectors
        options.resource_limits = limits
        logger.handlers[:] = handlers


def user_error(error: BaseException) -> TutelageError | None:
    """The one-line error behind what came out of Ray; None if it is a bug of this project."""
    import ray.exceptions

    found: BaseException | None = error
    while found is not None:
        if isinstance(found, TutelageError) and not isinstance(found, ray.exceptions.RayError):
            return type(found)(str(found).split(_UDF_NOTE)[0])
        found = getattr(found, "cause", None) or found.__cause__
    died = (
        ray.exceptions.RayActorError,
        ray.exceptions.WorkerCrashedError,
        ray.exceptions.OutOfMemoryError,
        ray.exceptions.ObjectLostError,
    )
    if isinstance(error, died) and not isinstance(error, ray.exceptions.RayTaskError):
        return TeacherError(
            f"a process of the job died and its retries are used up ({first_line(error)}); often "
            "the system killed it for memory: `dmesg` and Ray's logs say. What is committed stays; "
            "run the same command again"
        )
    return None
