"""The variables of a teacher's process on a CPU."""

import pytest

from labeler.run.openmp_env import openmp_env


def test_waiting_threads_sleep_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert openmp_env(3) == {"GOMP_SPINCOUNT": "10000", "OMP_NUM_THREADS": "3"}
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert openmp_env() == {"GOMP_SPINCOUNT": "7"}
