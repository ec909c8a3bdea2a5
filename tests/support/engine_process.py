"""An engine in a separate process, which hangs, crashes or is killed by certain tokens.

Imports only the standard library, so that it starts in a fraction of a second.
"""

import contextlib
import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

STOP, KILL, KILL_ALWAYS, CRASH, FAIL = range(901, 906)
ONCE = "once"


def engine(pipe: Connection, folder: Path) -> None:
    """Answers requests until it is killed."""
    with contextlib.suppress(EOFError):
        answer(pipe, folder)


def answer(pipe: Connection, folder: Path) -> None:
    while True:
        tokens = pipe.recv()
        first = not (folder / ONCE).exists()
        (folder / ONCE).touch()
        if STOP in tokens:
            os.kill(os.getpid(), signal.SIGSTOP)
        if KILL_ALWAYS in tokens or (KILL in tokens and first):
            os.kill(os.getpid(), signal.SIGKILL)
        if CRASH in tokens:
            os.kill(os.getpid(), signal.SIGSEGV)
        if FAIL in tokens:
            sys.exit(1)
        pipe.send(len(tokens))
