"""The variables of a teacher's process on a CPU, as its OpenMP library takes them."""

import os
import re
import subprocess
import sys

import pytest

from labeler.run.ray_cluster.openmp_env import openmp_env


def openmp_settings(environment: dict[str, str]) -> dict[str, str]:
    """What the OpenMP library of torch reports in a process with these variables."""
    done = subprocess.run(
        [sys.executable, "-c", "import torch; torch.ones(1 << 20).sum()"],
        env={**os.environ, **environment, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.findall(r"(\w+) = '(\w*)'", done.stderr)
    if not any(name == "GOMP_SPINCOUNT" for name, _ in found):
        pytest.skip("torch does not use GNU's OpenMP here")
    return dict(found)


def test_openmp_env_sets_threads_and_short_spins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    found = openmp_settings(openmp_env(3))
    assert (found["GOMP_SPINCOUNT"], found["OMP_NUM_THREADS"]) == ("10000", "3")


def test_openmp_env_keeps_what_the_user_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    found = openmp_settings(openmp_env())
    assert (found["GOMP_SPINCOUNT"], found["OMP_NUM_THREADS"]) == ("7", "2")
