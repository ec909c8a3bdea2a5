"""What goes wrong with a store, as told by its driver: what passes, and what is no damage.

Drivers have errors of their own, and raise those of Python without an errno (s3fs: PermissionError
for AccessDenied and ExpiredToken). None of them says anything about the bytes that are stored, so
none may be answered by dropping labels.
"""

import contextlib
import errno
from collections.abc import Iterator
from typing import IO, Any, Self

from schemas.errors import StoreError, TutelageError, first_line

# What a store answers about a path; callers tell these apart.
_ANSWERS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
# Where the classes of mistakes of a program are defined; those of drivers are elsewhere.
_OURS = frozenset(("builtins", "schemas", "labeler", "trainer", "cluster"))

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


def refuse_unreadable(error: BaseException, where: str) -> None:
    """Raises where reading failed, but nothing is known about the bytes that are stored.

    Returns where bytes came and made no sense, which is damage; Arrow says that by errors of its
    own, or by an OSError without an errno.

    Args:
        error: of a read, by Arrow or by a driver.
        where: the file.

    Raises:
        StoreError: it may pass, or is not allowed.
    """
    if isinstance(error, StoreError):
        raise error
    passes = is_transient(error)
    # EINVAL: damaged bytes named a place that no file has.
    is_senseless = not isinstance(error, OSError) or (
        type(error) is OSError and error.errno in (None, errno.EINVAL)
    )
    if is_senseless and not passes:
        return
    raise store_failure(error, where, "cannot be read") from error


@contextlib.contextmanager
def store_errors(where: str) -> Iterator[None]:
    """Turns what a store's driver raises into one line that says where, why and what to do.

    What is or is not at a path stays as it is, for whoever asked to answer, and so do the mistakes
    of this program.

    Args:
        where: URL of the file or folder.

    Raises:
        StoreError: the driver failed.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (TutelageError, *_ANSWERS)) or not _is_of_driver(error):
            raise
        raise store_failure(error, where, "cannot be read or written") from error


def _is_of_driver(error: Exception) -> bool:
    """Whether the system raised it, or a library that has a class of its own for it."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] not in _OURS


def store_failure(error: BaseException, where: str, what: str) -> StoreError:
    """What cannot be done where, why, and what to do."""
    advice = "see to the credentials, the bucket or the permissions, then"
    if is_transient(error):
        advice = "that may pass:"
    return StoreError(f"{where}: {what} ({first_line(error)}); {advice} run the same command again")


class GuardedFile:
    """A file of a driver, whose failures are those of its store, at each block as at the opening.

    It has the methods that readers and writers of this project use, and Arrow; see `IO`.
    """

    def __init__(self, file: IO[bytes], where: str) -> None:
        self._file = file
        self._where = where

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        with store_errors(self._where):
            return self._file.read(size)

    def write(self, data: Any) -> int:
        with store_errors(self._where):
            return self._file.write(data)

    def flush(self) -> None:
        with store_errors(self._where):
            self._file.flush()

    def close(self) -> None:
        with store_errors(self._where):
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
