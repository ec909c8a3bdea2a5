"""Finds, stops and kills descendants of the test process."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path


def descendants(ancestor: int) -> Iterator[tuple[int, str]]:
    """Process id and command line of all processes below one."""
    parents, names = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            status = (path / "stat").read_text()
            names[int(path.name)] = (path / "cmdline").read_text()
            parents[int(path.name)] = int(status.rpartition(")")[2].split()[1])
        except OSError:
            continue
    for pid, name in names.items():
        above: int | None = pid
        while above in parents and above != ancestor:
            above = parents[above]
        if above == ancestor and pid != ancestor:
            yield pid, name


def training_ranks() -> list[int]:
    """The training processes that belong to this test process's Ray."""
    return [pid for pid, name in descendants(os.getpid()) if "RayTrainWorker" in name]


def send(pids: list[int], number: signal.Signals) -> None:
    """Sends a signal to processes, ignoring those that have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
