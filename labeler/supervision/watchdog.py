"""Stops hanging engines, and distinguishes crashed engines from killed ones.

An out-of-process engine is stopped by killing its processes; the call waiting on it then fails as
after any crash. An in-process engine is stopped by ending this process: the attempt's record stays
and counts as a crash, and Ray restarts the process.
"""

import faulthandler
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

import psutil

EXIT_STALLED = 75
"""Exit code of a process whose in-process engine hangs."""

_OUTSIDE_SIGNALS = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP}
_CHECKS_PER_STALL = 20
_MAX_CHECK_S = 1.0

_NOTICE_S = 2.0
"""Grace period for a call to notice on its own that the engine's process is gone."""

_GONE_S = 60.0
"""Seconds after which a call that has not noticed never will."""

_REAP_S = 2.0
_FIND_S = 0.1


class Watchdog:
    """Watches one engine at a time."""

    def __init__(self, stall_s: float, end_process: Callable[[int], None] = os._exit) -> None:
        """
        Args:
            stall_s: an engine hangs if a call waits this many seconds without any result.
            end_process: ends this process with the given exit code.
        """
        self.stall_s = stall_s
        self.wake: Callable[[], None] | None = None
        """Fails the calls waiting on an engine whose process is gone."""
        self._check_s = min(stall_s / _CHECKS_PER_STALL, _MAX_CHECK_S)
        self._end_process = end_process
        self._changed = threading.Condition()
        self._num_waiting = 0
        self._last_result_s = 0.0
        self._before: set[BaseProcess] = set()
        self._processes: set[BaseProcess] = set()
        self._has_killed = False
        self._oom_kills = 0
        self._is_started = False
        self._gone_since_s = 0.0
        self._thread: threading.Thread | None = None

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Wraps the start of an engine; child processes that appear meanwhile belong to it."""
        self._before = set(multiprocessing.active_children())
        self._processes = set()
        self.wake = None
        self._is_started = False
        self._gone_since_s = 0.0
        self._has_killed = False
        self._oom_kills = _count_oom_kills()
        is_over = threading.Event()
        # Polled, because a process that exits during the start is no longer a child afterwards.
        finder = threading.Thread(target=self._find_processes, args=(is_over,), daemon=True)
        finder.start()
        try:
            with self.waiting():
                yield
        finally:
            is_over.set()
            finder.join()
        # A process that has already exited only helped to start the engine.
        self._processes = {process for process in self._processes if process.is_alive()}
        self._is_started = True

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wraps a call that waits for the engine."""
        with self._changed:
            if not self._num_waiting:
                self._last_result_s = time.monotonic()
                self._set_alarm()  # here, because the watchdog thread may never get to run
            self._num_waiting += 1
            if self._thread is None and math.isfinite(self.stall_s):
                self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._num_waiting -= 1
                self._last_result_s = time.monotonic()
                self._changed.notify_all()

    def was_killed_from_outside(self) -> bool:
        """Whether an engine process received a signal that no row can have caused.

        A row can trigger the kernel's out-of-memory killer, which is recognised by its counter.
        """
        end = time.monotonic() + _REAP_S
        while any(process.exitcode is None for process in self._processes):
            if time.monotonic() > end:
                break
            time.sleep(0.02)
        codes = {process.exitcode for process in self._processes} - {0, None}
        if self._has_killed or not codes or codes - _OUTSIDE_SIGNALS:
            return False
        return _count_oom_kills() == self._oom_kills

    @property
    def has_killed_engine(self) -> bool:
        """Whether this watchdog has killed the engine for hanging."""
        return self._has_killed

    def _find_processes(self, is_over: threading.Event) -> None:
        while not is_over.wait(_FIND_S):
            self._processes |= set(multiprocessing.active_children()) - self._before
        self._processes |= set(multiprocessing.active_children()) - self._before

    def _watch(self) -> None:
        while True:
            with self._changed:
                if not self._num_waiting:
                    faulthandler.cancel_dump_traceback_later()
                    self._changed.wait_for(lambda: self._num_waiting)
                quiet_s = time.monotonic() - self._last_result_s
            self._set_alarm()
            if quiet_s >= self.stall_s:
                self._end_engine(quiet_s)
            self._wake_if_gone()
            time.sleep(self._check_s)

    def _set_alarm(self) -> None:
        # An engine that hangs while holding the GIL blocks this thread too; faulthandler's timer
        # thread does not need the GIL.
        if math.isfinite(self.stall_s):
            after_s = self.stall_s + 2 * self._check_s
            faulthandler.dump_traceback_later(after_s, exit=True, file=sys.__stderr__ or 2)

    def _wake_if_gone(self) -> None:
        if not self._is_started or all(process.is_alive() for process in self._processes):
            return
        now = time.monotonic()
        self._gone_since_s = self._gone_since_s or now
        gone_s = now - self._gone_since_s
        if gone_s >= _GONE_S:
            self._end_process(EXIT_STALLED)
        if gone_s >= _NOTICE_S and self.wake is not None:
            self.wake()

    def _end_engine(self, quiet_s: float) -> None:
        own = [process for process in self._processes if process.is_alive()]
        what = f"its {len(own)} processes" if own else "this process"
        text = f"the engine gave no result for {quiet_s:.0f}s (run.stall_s); ending {what}\n"
        os.write(2, text.encode())
        # The engine was killed but the call has not returned: only ending this process helps.
        if not own or self._has_killed:
            self._end_process(EXIT_STALLED)
        self._has_killed = True
        for process in own:
            _kill_tree(process.pid)
        with self._changed:
            self._last_result_s = time.monotonic()


def _kill_tree(pid: int | None) -> None:
    try:
        root = psutil.Process(pid)
        for process in (*root.children(recursive=True), root):
            process.kill()
    except psutil.NoSuchProcess:
        return


def _count_oom_kills() -> int:
    """Out-of-memory kills by this machine's kernel since boot; 0 if unknown."""
    try:
        with open("/proc/vmstat") as file:
            counters = dict(line.split() for line in file)
    except OSError:
        return 0
    return int(counters.get("oom_kill", 0))
