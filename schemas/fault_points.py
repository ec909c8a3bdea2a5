"""Points at which a test can kill a process; outside tests they do nothing.

A test puts a folder in the environment before processes start. If the folder contains a file named
after a point, the first process to reach that point deletes the file and is killed.
"""

import os
import signal

FOLDER_VARIABLE = "TUTELAGE_FAULT_POINTS"

_FOLDER = os.environ.get(FOLDER_VARIABLE, "")


def fault_point(name: str) -> None:
    """Kills this process, as by `kill -9`, if a test has requested it."""
    if not _FOLDER:
        return
    try:
        os.unlink(f"{_FOLDER}/{name}")
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
