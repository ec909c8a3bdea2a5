"""The variables of a teacher's process on a CPU."""

import pytest

from labeler.run.openmp_env import cpu_environment


def test_waiting_threads_sleep_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert cpu_environment(3) == {"GOMP_SPINCOUNT": "10000", "OMP_NUM_THREADS": "3"}
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert cpu_environment() == {"GOMP_SPINCOUNT": "7"}
