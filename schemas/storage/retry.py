"""Stores that fail for a while: what is worth another try, how often, and who is told.

A disk that is full gets room again, a store that answers 503 calms down; a job that has worked for
days should wait for that. Whatever else is wrong is said at once.
"""

import contextlib
import functools
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from schemas.errors import StoreError, first_line
from schemas.storage.driver_errors import is_transient, store_errors

P = ParamSpec("P")
T = TypeVar("T")

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 30.0


class _Settings(threading.local):
    """What holds in one thread."""

    is_waiting_for = False


_thread = _Settings()
_patience_s = 0.0
_tell: Callable[[str], None] | None = None


def be_patient(patience_s: float, tell: Callable[[str], None] | None = None) -> None:
    """Has every store of this process tried again from now on.

    Args:
        patience_s: How long, for one file; 0: not at all, as a process does that never calls this.
        tell: Gets a line whenever a store is waited for; None: the standard error stream does.
    """
    global _patience_s, _tell
    _patience_s, _tell = patience_s, tell


@contextlib.contextmanager
def patience(patience_s: float, tell: Callable[[str], None] | None = None) -> Iterator[None]:
    """`be_patient` for a while."""
    before = _patience_s, _tell
    be_patient(patience_s, tell)
    try:
        yield
    finally:
        be_patient(*before)


def patiently(action: Callable[[], T], where: str) -> T:
    """Does something with a store, again and again while it fails in a transient way.

    Args:
        action: Can be repeated from its beginning, whatever it left behind.
        where: The file or folder, for messages.

    Raises:
        StoreError: It failed for longer than the patience of this process.
        Exception: Whatever else `action` raises.
    """
    if _patience_s <= 0 or _thread.is_waiting_for:
        return action()
    _thread.is_waiting_for = True  # what is part of the action does not wait on its own as well
    try:
        return _repeated(action, where)
    finally:
        _thread.is_waiting_for = False


def patient(method: Callable[P, T]) -> Callable[P, T]:
    """`patiently`, for methods of a store whose first argument is a path in it.

    What is not worth another try, and what was tried for too long, is a StoreError then.
    """

    @functools.wraps(method)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        store: Any = args[0]
        rel = args[1] if len(args) > 1 else ""
        where = f"{store.url.rstrip('/')}/{rel}"
        with store_errors(where):
            return patiently(lambda: method(*args, **kwargs), where)

    return wrapper


def _repeated(action: Callable[[], T], where: str) -> T:
    start = time.monotonic()
    delay_s = FIRST_DELAY_S
    while True:
        try:
            return action()
        except Exception as error:
            if not is_transient(error):
                raise
            waited_s = time.monotonic() - start
            # Of a StoreError that was made on the way, not its advice but what it was made from.
            cause = error.__cause__ if isinstance(error, StoreError) else None
            what = f"{where}: {first_line(cause or error)}"
            if waited_s >= _patience_s:
                raise StoreError(
                    f"{what}; tried again for {waited_s:.0f}s. What is committed stays: once there "
                    "is room, or the store answers, run the same command again to go on from here"
                ) from error
        # Jitter, so that all who wait for one store do not come back together.
        pause_s = min(delay_s * random.uniform(0.5, 1.0), max(0.0, _patience_s - waited_s))
        text = f"{what}; trying again in {pause_s:.1f}s, for {waited_s:.0f} of {_patience_s:.0f}s"
        (_tell or _tell_stderr)(text)
        time.sleep(pause_s)
        delay_s = min(2 * delay_s, MAX_DELAY_S)


def _tell_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
