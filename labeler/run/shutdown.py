"""Stops a job on SIGTERM (preemption) or Ctrl-C.

The first signal lets in-flight units finish; a second one, or the drain timeout, ends the job
immediately. Both are safe: committed units are kept, and the next run resumes.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from schemas.console.text import duration_text
from schemas.errors import JobStoppedError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_CLEAR_LINE = "\r\x1b[K"


class _DrainTimeoutError(BaseException):
    """A BaseException, so that no ``except Exception`` on the way out swallows it."""


class GracefulShutdown:
    """Handles signals while a job runs; does nothing outside the main thread."""

    def __init__(self, drain_s: float) -> None:
        """
        Args:
            drain_s: seconds for in-flight units to finish.
        """
        self._drain_s = drain_s
        self._signal: signal.Signals | None = None

    @property
    def is_requested(self) -> bool:
        """Whether a signal has arrived."""
        return self._signal is not None

    @contextmanager
    def draining(self) -> Iterator[None]:
        """Makes the first signal only set ``is_requested`` and start the drain timer.

        Raises:
            JobStoppedError: on exit, after SIGTERM.
            KeyboardInterrupt: on exit, after Ctrl-C.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        # SIGALRM, because only a signal interrupts the main thread while it waits for Ray.
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._on_timeout)
        outcome = "in-flight units are committed"
        try:
            try:
                yield
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                for number, handler in before.items():
                    signal.signal(number, handler)
        except _DrainTimeoutError:
            outcome = (
                f"in-flight units took longer than run.drain_s = {self._drain_s:g} and are lost"
            )
        except KeyboardInterrupt:
            if self._signal is None:
                raise
            outcome = "a second signal arrived, so in-flight units are lost"
        if self._signal is signal.SIGINT:
            raise KeyboardInterrupt(outcome)
        if self._signal is not None:
            raise JobStoppedError(
                f"stopped by {self._signal.name}: {outcome}; committed units are kept, run the "
                "same command again to resume"
            )

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._signal is not None:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number)
        signal.setitimer(signal.ITIMER_REAL, self._drain_s)
        # Not print: the signal may have interrupted a write to the same stream.
        text = (
            f"{self._signal.name}: no new units; in-flight units have "
            f"{duration_text(self._drain_s)} to finish (signal again to stop immediately)\n"
        )
        os.write(2, ((_CLEAR_LINE if os.isatty(2) else "") + text).encode())

    def _on_timeout(self, _: int, __: FrameType | None) -> None:
        raise _DrainTimeoutError
