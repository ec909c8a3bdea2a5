"""Places where a test can have a process die; nothing happens at them anywhere else.

A test names a folder in the environment before the processes start. Where a file with the name of a
point is in it, the first process that comes by takes the file away and is killed there.
"""

import os
import signal

FOLDER_VARIABLE = "TUTELAGE_FAULT_POINTS"

_FOLDER = os.environ.get(FOLDER_VARIABLE, "")


def fault_point(name: str) -> None:
    """Dies here, as by `kill -9`, if a test wants it."""
    if not _FOLDER:
        return
    try:
        os.unlink(f"{_FOLDER}/{name}")
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
