"""A reader-writer lock: many threads hold it together, or one holds it exclusively."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class SharedLock:
    """Grants shared or exclusive access; a waiting exclusive request blocks later shared ones.

    Not reentrant in either mode.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_shared = 0
        self._num_waiting = 0  # for exclusive access
        self._is_exclusive = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Holds the lock in shared mode."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_exclusive and not self._num_waiting)
            self._num_shared += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_shared -= 1
                self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Waits for all holders to release the lock, then holds it exclusively."""
        with self._changed:
            self._num_waiting += 1
            self._changed.wait_for(lambda: not self._is_exclusive and not self._num_shared)
            self._num_waiting -= 1
            self._is_exclusive = True
        try:
            yield
        finally:
            with self._changed:
                self._is_exclusive = False
                self._changed.notify_all()
