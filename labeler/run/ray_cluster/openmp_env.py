"""OpenMP variables that must be set before a CPU teacher's process starts."""

import os

# Spins of a waiting thread before it sleeps: about half a millisecond, longer than any pause within
# a forward pass. OpenMP's default spins for tens of milliseconds on a core that could label or
# write meanwhile.
_SPIN_COUNT = "10000"


def openmp_env(num_threads: int | None = None) -> dict[str, str]:
    """Returns the variables that OpenMP reads on load; keeps the user's GOMP_SPINCOUNT.

    Args:
        num_threads: threads of the process; None: OpenMP's own choice.
    """
    environment = {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", _SPIN_COUNT)}
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    return environment
