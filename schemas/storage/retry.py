"""Retries of transient store failures.

Disks get freed and stores that answer 503 recover; a job that has run for days should wait for
that. All other failures are raised immediately.
"""

import contextlib
import functools
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from schemas.errors import StoreError, first_line
from schemas.storage.driver_errors import is_transient, store_errors

P = ParamSpec("P")
T = TypeVar("T")

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 30.0


def _print_to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class RetryPolicy:
    """How a process retries transient store failures.

    Attributes:
        timeout_s: seconds to retry one operation on one file; 0: no retries.
        report: called with one line before each pause.
    """

    timeout_s: float = 0.0
    report: Callable[[str], None] = _print_to_stderr


class _Thread(threading.local):
    is_retrying = False


_thread = _Thread()
_policy = RetryPolicy()


def set_retry_policy(policy: RetryPolicy) -> None:
    """Sets the policy of every store in this process, in all threads."""
    global _policy
    _policy = policy


@contextlib.contextmanager
def retrying(policy: RetryPolicy) -> Iterator[None]:
    """Applies a policy to this process, in all threads, for a ``with`` block."""
    before = _policy
    set_retry_policy(policy)
    try:
        yield
    finally:
        set_retry_policy(before)


def retry(action: Callable[[], T], where: str) -> T:
    """Runs a store operation and retries it on transient failures.

    Args:
        action: an operation that can be restarted after failing at any point.
        where: file or folder, for messages.

    Raises:
        StoreError: it kept failing for longer than the policy's timeout.
        Exception: any other error that `action` raises.
    """
    # Only the outermost operation of a thread retries; otherwise nested timeouts would add up.
    if _policy.timeout_s <= 0 or _thread.is_retrying:
        return action()
    _thread.is_retrying = True
    try:
        return _repeat(action, where, _policy)
    finally:
        _thread.is_retrying = False


def retried(method: Callable[P, T]) -> Callable[P, T]:
    """Decorates a store method whose first argument is a path in the store.

    The method is run by `retry`; permanent failures, and those that outlast the timeout, become a
    StoreError.
    """

    @functools.wraps(method)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        store: Any = args[0]
        rel = args[1] if len(args) > 1 else ""
        where = f"{store.url.rstrip('/')}/{rel}"
        with store_errors(where):
            return retry(lambda: method(*args, **kwargs), where)

    return wrapper


def _repeat(action: Callable[[], T], where: str, policy: RetryPolicy) -> T:
    start = time.monotonic()
    delay_s = FIRST_DELAY_S
    while True:
        try:
            return action()
        except Exception as error:
            if not is_transient(error):
                raise
            waited_s = time.monotonic() - start
            # A nested StoreError already includes advice; its cause is the plain failure.
            cause = error.__cause__ if isinstance(error, StoreError) else None
            problem = f"{where}: {first_line(cause or error)}"
            if waited_s >= policy.timeout_s:
                raise StoreError(
                    f"{problem}; retried for {waited_s:.0f}s. Committed units are kept: free space "
                    "or wait for the store to recover, then run the same command again to resume"
                ) from error
        # Jitter keeps many workers from hitting the store again at the same moment.
        pause_s = min(delay_s * random.uniform(0.5, 1.0), max(0.0, policy.timeout_s - waited_s))
        policy.report(
            f"{problem}; retrying in {pause_s:.1f}s ({waited_s:.0f} of {policy.timeout_s:.0f}s)"
        )
        time.sleep(pause_s)
        delay_s = min(2 * delay_s, MAX_DELAY_S)
