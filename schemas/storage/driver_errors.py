"""Classifies errors of store drivers: transient ones, and ones that indicate damaged data.

Drivers raise their own classes, and Python's without an errno (s3fs: PermissionError for
AccessDenied and ExpiredToken). None of these implies damaged bytes, so none may lead to dropped
labels.
"""

import contextlib
import errno
from collections.abc import Iterator
from typing import IO, Any, Self

from schemas.errors import StoreError, TutelageError, first_line

# These describe the path and are not failures; callers handle each of them.
_ANSWERS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
# Exceptions defined in these packages come from this program, not from a driver.
_OURS = frozenset(("builtins", "schemas", "labeler", "trainer", "cluster"))

_TRANSIENT_ERRNO = frozenset(
    (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EIO,
        getattr(errno, "EREMOTEIO", errno.EIO),  # s3fs, for status 500
        errno.ESTALE,
        errno.EAGAIN,
        errno.EBUSY,  # s3fs, for status 503
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
# Failed or lost connections, by class name: the libraries of drivers are not imported here.
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


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later."""
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


def refuse_unreadable(error: BaseException, where: str) -> None:
    """Raises unless the error of a read indicates damaged bytes.

    Arrow reports bytes that it cannot decode with its own exceptions or an OSError without an
    errno; for these the function returns.

    Args:
        error: exception that Arrow or a driver raised during a read.
        where: the file.

    Raises:
        StoreError: the failure is transient, or access was denied.
    """
    if isinstance(error, StoreError):
        raise error
    # EINVAL: damaged bytes were decoded as an impossible file offset.
    is_undecodable = not isinstance(error, OSError) or (
        type(error) is OSError and error.errno in (None, errno.EINVAL)
    )
    if is_undecodable and not is_transient(error):
        return
    raise store_failure(error, where, "cannot be read") from error


@contextlib.contextmanager
def store_errors(where: str) -> Iterator[None]:
    """Converts driver errors to a StoreError of one line: where, why, and what to do.

    Errors that describe a path (missing, a folder) and bugs of this program pass through.

    Args:
        where: URL of the file or folder.

    Raises:
        StoreError: the driver failed.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (TutelageError, *_ANSWERS)) or not _is_driver_error(error):
            raise
        raise store_failure(error, where, "cannot be read or written") from error


def _is_driver_error(error: Exception) -> bool:
    """Whether the operating system or a third-party library raised the error."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] not in _OURS


def store_failure(error: BaseException, where: str, what: str) -> StoreError:
    """Builds a StoreError that states where `what` failed, why, and what to do."""
    advice = "check credentials, bucket and permissions, then"
    if is_transient(error):
        advice = "this may be temporary:"
    return StoreError(f"{where}: {what} ({first_line(error)}); {advice} run the same command again")


class GuardedFile:
    """Wraps a driver's file so that reads and writes raise StoreErrors too.

    Covers the `IO` methods that this project and Arrow call.
    """

    def __init__(self, file: IO[bytes], where: str) -> None:
        self._file = file
        self._where = where

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._file, name)
        if not callable(found):
            return found

        def guarded(*args: Any) -> Any:
            with store_errors(self._where):
                return found(*args)

        return guarded

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _status(error: BaseException) -> int:
    """The HTTP status of a driver error; 0 if it has none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status if isinstance(status, int) else 0
    for name in ("status", "status_code", "code"):
        status = getattr(error, name, None)
        if isinstance(status, int):
            return status
    return 0
