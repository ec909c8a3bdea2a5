"""Stores that fail for a while: what is worth another try, how often, and who is told.

A disk that is full gets room again, a store that answers 503 calms down; a job that has worked for
days should wait for that. Whatever else is wrong is said at once.
"""

import contextlib
import errno
import functools
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from schemas.errors import StoreError, first_line

P = ParamSpec("P")
T = TypeVar("T")

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 30.0

_TRANSIENT_ERRNO = frozenset(
    (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EIO,
        getattr(errno, "EREMOTEIO", errno.EIO),  # what s3fs makes of status 500
        errno.ESTALE,
        errno.EAGAIN,
        errno.EBUSY,  # what s3fs makes of status 503
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ETIMEDOUT,
        errno.EPIPE,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.ENETDOWN,
    )
)
_TRANSIENT_STATUS = frozenset((408, 425, 429, 500, 502, 503, 504, 507))
# Of the drivers' libraries, which are not imported here: no connection, or one that was lost.
_TRANSIENT_NAMES = frozenset(
    (
        "EndpointConnectionError",
        "ConnectionClosedError",
        "ConnectTimeoutError",
        "ReadTimeoutError",
        "HTTPClientError",
        "ClientConnectionError",
        "ClientPayloadError",
        "ServerDisconnectedError",
        "ServiceRequestError",
        "ServiceResponseError",
        "IncompleteRead",
    )
)


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


def is_transient(error: BaseException) -> bool:
    """Whether the same call may well succeed later."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, TimeoutError | ConnectionError):
            return True
        if isinstance(found, OSError) and found.errno in _TRANSIENT_ERRNO:
            return True
        if _status(found) in _TRANSIENT_STATUS or type(found).__name__ in _TRANSIENT_NAMES:
            return True
        found = found.__cause__ or found.__context__
    return False


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
    """`patiently`, for methods of a store whose first argument is a path in it."""

    @functools.wraps(method)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        store: Any = args[0]
        rel = args[1] if len(args) > 1 else ""
        return patiently(lambda: method(*args, **kwargs), f"{store.url.rstrip('/')}/{rel}")

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
            what = f"{where}: {first_line(error)}"
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


def _status(error: BaseException) -> int:
    """The HTTP status that an error of a driver carries; 0 where it carries none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status if isinstance(status, int) else 0
    for name in ("status", "status_code", "code"):
        status = getattr(error, name, None)
        if isinstance(status, int):
            return status
    return 0


def _tell_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
