"""What goes wrong with a store, as told by its driver: what passes, and what is no damage.

Drivers have errors of their own, and raise those of Python without an errno (s3fs: PermissionError
for AccessDenied and ExpiredToken). None of them says anything about the bytes that are stored, so
none may be answered by dropping labels.
"""

import errno

from schemas.errors import StoreError, first_line

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
    advice = "that may pass" if passes else "see to the credentials or permissions"
    raise StoreError(
        f"{where}: cannot be read ({first_line(error)}); {advice}, then run the same command again"
    ) from error


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
