"""OpenMP variables that a process which runs a teacher on a CPU needs before it starts."""

import os

# How often a waiting thread spins before it sleeps: half a millisecond, which is longer than any
# pause within a forward pass. OpenMP's default spins for tens of milliseconds, on a core that could
# label or write meanwhile.
_SPIN_COUNT = "10000"


def openmp_env(num_threads: int | None = None) -> dict[str, str]:
    """Variables that OpenMP reads when it is loaded; GOMP_SPINCOUNT of the user stays.

    Args:
        num_threads: threads of the process; None: OpenMP's own choice.
    """
    environment = {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", _SPIN_COUNT)}
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    return environment
