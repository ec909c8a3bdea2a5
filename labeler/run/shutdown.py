"""How a job is asked to stop: SIGTERM (preemption) or Ctrl-C, once.

The first signal lets what is in work be finished; a second one, or the end of the time that is
given for that, ends the job at once. Both are safe: what is committed stays, the next run goes on.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from labeler.run.progress import duration
from schemas.errors import JobStoppedError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
GO_ON = "what is committed stays; run the same command again to go on from here"


class _DrainedTooLongError(BaseException):
    """No Exception: nothing on its way out may take it for an error of its own."""


class StopRequests:
    """Listens for signals while a job runs; only where the job is on the main thread."""

    def __init__(self, drain_s: float) -> None:
        """Prepares; what is in work has ``drain_s`` seconds to be finished."""
        self._drain_s = drain_s
        self._asked: signal.Signals | None = None

    @property
    def is_asked(self) -> bool:
        """Whether the job has been asked to stop."""
        return self._asked is not None

    @contextmanager
    def draining(self) -> Iterator[None]:
        """While it is open, a first signal only sets ``is_asked`` and starts the clock.

        Raises:
            JobStoppedError: At its end, where SIGTERM came.
            KeyboardInterrupt: At its end, where Ctrl-C came.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._asked_to) for number in _SIGNALS}
        alarm = signal.signal(signal.SIGALRM, self._too_long)
        how = "what was in work is committed"
        try:
            try:
                yield
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                for number, handler in {**before, signal.SIGALRM: alarm}.items():
                    signal.signal(number, handler)
        except _DrainedTooLongError:
            how = f"what was in work took longer than run.drain_s = {self._drain_s:g} and is lost"
        except KeyboardInterrupt:
            if self._asked is None:
                raise
            how = "asked twice, so what was in work is lost"
        if self._asked is signal.SIGINT:
            raise KeyboardInterrupt(how)
        if self._asked is not None:
            raise JobStoppedError(f"stopped by {self._asked.name}: {how}; {GO_ON}")

    def _asked_to(self, number: int, _: FrameType | None) -> None:
        if self._asked is not None:
            raise KeyboardInterrupt
        self._asked = signal.Signals(number)
        signal.setitimer(signal.ITIMER_REAL, self._drain_s)
        # Not print: a signal may come while the stream is being written to.
        text = (
            f"{self._asked.name}: no new units; what is in work has {duration(self._drain_s)} "
            "to be finished (once more: stop at once)\n"
        )
        os.write(2, text.encode())

    def _too_long(self, _: int, __: FrameType | None) -> None:
        raise _DrainedTooLongError
