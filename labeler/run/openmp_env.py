"""What a process that runs a teacher on a CPU needs in its environment before it starts."""

import os

# How often a thread that waits for the next parallel region looks before it sleeps: half a
# millisecond, which is longer than any pause within a forward pass. Left alone, OpenMP looks for
# tens of milliseconds, on a core that could label or write meanwhile.
_SPIN_COUNT = "10000"


def cpu_environment(num_threads: int | None = None) -> dict[str, str]:
    """Variables that OpenMP reads when it is loaded; what the user has set stays.

    Args:
        num_threads: of the process; None: not decided here.
    """
    environment = {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", _SPIN_COUNT)}
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    return environment
