"""Training on ranks without Ray Train, for tests of what a run computes and leaves behind.

Ray Train takes longer to start than these runs to train. Here the ranks are forked from one process
that has imported everything. Every run still has processes of its own, and no state of a former
run. Nothing is restarted: what needs that is tested on Ray Train itself.
"""

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.managers import BaseManager
from typing import Any

import torch.distributed as dist

from schemas.console.progress import Progress
from schemas.errors import StudentError
from tests.support import ROOT
from trainer.config.train import TrainConfig
from trainer.run.launch import run_train_job
from trainer.run.status import shown
from trainer.run.worker import TrainJob, train_worker
from trainer.run_folder import RunFolder, TrainSummary
from trainer.tracking.run_status import RunStatus

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.support.rank_imports"])
_TIMEOUT_S = 300.0
_GRACE_S = 20.0
"""How long ranks may outlive one that failed; Ray Train ends them as well."""


def forks() -> Any:
    """Makes processes by forking the one that has imported everything, which it starts."""
    with contextlib.chdir(ROOT):  # where it finds the module to preload
        forkserver.ensure_running()
    return FORKS


class Statuses(BaseManager):
    """A process that holds the status of every run."""


Statuses.register("RunStatus", RunStatus)


@functools.cache
def statuses() -> Any:
    manager = Statuses(ctx=forks())
    manager.start()
    return manager


def train(config: TrainConfig, progress: bool = True) -> TrainSummary:
    """`run_train_job` on the ranks of the pool, as many as the run has at most."""
    return run_train_job(config, progress, train_on_ranks)


def train_on_ranks(
    config: TrainConfig, folder: RunFolder, view_hash: str, num_steps: int, progress: Progress
) -> None:
    """Runs all workers to the end.

    Raises:
        TutelageError: what a worker met; a StudentError where one ended without a known reason.
    """
    status = statuses().RunStatus()
    job = TrainJob(config, os.getcwd(), folder.claim(), view_hash, num_steps, status)
    with shown(status, progress):
        codes = run_on_ranks(train_worker, config.ray.max_workers, job)
    error = status.error()
    if error is not None:
        raise error
    if any(codes):
        raise StudentError(f"the ranks ended with exit codes {codes}")


def run_on_ranks(function: Callable[..., None], world_size: int, *arguments: Any) -> list[int]:
    """Calls a function of a module on every rank of a process group; returns their exit codes."""
    with tempfile.TemporaryDirectory() as meeting:
        ranks = [
            forks().Process(
                target=_run_rank,
                args=(rank, world_size, meeting, dict(os.environ), function, arguments),
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        _wait(ranks)
    return [process.exitcode for process in ranks]


def _run_rank(
    rank: int,
    world_size: int,
    meeting: str,
    environment: dict[str, str],
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    """Does what Ray Train does around a worker.

    Args:
        environment: of the test; a fork has that of the moment when the forking process started.
    """
    # A failed import of the preloaded module shows nowhere else.
    assert "deepspeed" in sys.modules, "tests.support.rank_imports cannot be imported"
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    os.environ |= environment | {name: str(value) for name, value in place.items()}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}/ranks",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=_TIMEOUT_S),
    )
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()


def _wait(ranks: list[Any]) -> None:
    """Waits for all; ends those that do not notice that another one failed."""
    running = {process.sentinel: process for process in ranks}
    failed = False
    while running:
        ended = multiprocessing.connection.wait(list(running), _GRACE_S if failed else None)
        for sentinel in ended:
            process = running.pop(sentinel)
            process.join()
            failed |= process.exitcode != 0
        if failed and not ended:
            for process in running.values():
                process.kill()
