"""Ends engines that give nothing back, and tells how the processes of one came to their end.

An engine that runs in processes of its own is ended by killing these: the call that waits for it
then fails as with any engine that dies. One that runs in this process takes it along, so that
whoever runs the process starts it anew; the record of the attempt stays and tells of it.
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
"""How a process ends whose engine hangs inside it."""

_FROM_OUTSIDE = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP}
_CHECKS_A_STALL = 20
_MAX_CHECK_S = 1.0
_NOTICE_S = 2.0
"""How long a call may take to notice by itself that the engine's process is gone."""

_GONE_S = 60.0
"""After which nothing helps it to."""

_REAP_S = 2.0
_FIND_S = 0.1


class EngineWatch:
    """Watches one engine after another."""

    def __init__(self, stall_s: float, end_process: Callable[[int], None] = os._exit) -> None:
        """Prepares.

        Args:
            stall_s: How long nothing may come back while somebody waits.
            end_process: Ends this process with an exit code.
        """
        self.stall_s = stall_s
        self._check_s = min(stall_s / _CHECKS_A_STALL, _MAX_CHECK_S)
        self._end_process = end_process
        self._changed = threading.Condition()
        self._waiting = 0
        self._last_sign_s = 0.0
        self._before: set[BaseProcess] = set()
        self._processes: set[BaseProcess] = set()
        self._killed_here = False
        self._oom_kills = 0
        self._is_started = False
        self._gone_since_s = 0.0
        self.wake: Callable[[], None] | None = None
        """Has the calls fail that wait for an engine whose process is gone."""
        self._thread: threading.Thread | None = None

    @contextmanager
    def starting(self) -> Iterator[None]:
        """While an engine starts; the processes that come into being are its own."""
        self._before = set(multiprocessing.active_children())
        self._processes = set()
        self.wake = None
        self._is_started = False
        self._gone_since_s = 0.0
        self._killed_here = False
        self._oom_kills = _oom_kills()
        is_over = threading.Event()
        # Again and again: who dies while it starts is not among the children afterwards.
        finder = threading.Thread(target=self._find_processes, args=(is_over,), daemon=True)
        finder.start()
        try:
            with self.waiting():
                yield
        finally:
            is_over.set()
            finder.join()
        # Whoever has ended by now only helped to start it.
        self._processes = {process for process in self._processes if process.is_alive()}
        self._is_started = True

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While somebody waits for the engine."""
        with self._changed:
            if not self._waiting:
                self._last_sign_s = time.monotonic()
                self._set_alarm()  # not in the thread, which may never get to run
            self._waiting += 1
            if self._thread is None and math.isfinite(self.stall_s):
                self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._waiting -= 1
                self._last_sign_s = time.monotonic()
                self._changed.notify_all()

    def was_ended_from_outside(self) -> bool:
        """Whether a process of the engine got a signal that no row can have brought about.

        Memory that ran out is no such thing, though the kernel ends processes for it in the same
        way: it counts what it ends.
        """
        end = time.monotonic() + _REAP_S
        while any(process.exitcode is None for process in self._processes):
            if time.monotonic() > end:
                break
            time.sleep(0.02)
        codes = {process.exitcode for process in self._processes} - {0, None}
        if self._killed_here or not codes or codes - _FROM_OUTSIDE:
            return False
        return _oom_kills() == self._oom_kills

    def has_ended_it(self) -> bool:
        """Whether it was this watch that ended the engine's processes, because it hung."""
        return self._killed_here

    def _find_processes(self, is_over: threading.Event) -> None:
        while not is_over.wait(_FIND_S):
            self._processes |= set(multiprocessing.active_children()) - self._before
        self._processes |= set(multiprocessing.active_children()) - self._before

    def _watch(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    faulthandler.cancel_dump_traceback_later()
                    self._changed.wait_for(lambda: self._waiting)
                quiet_s = time.monotonic() - self._last_sign_s
            self._set_alarm()
            if quiet_s >= self.stall_s:
                self._end_engine(quiet_s)
            self._wake_if_gone()
            time.sleep(self._check_s)

    def _set_alarm(self) -> None:
        """Ends this process should no thread run any more: an engine may hold Python's lock."""
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
        how = f"its {len(own)} processes are" if own else "this process is"
        text = f"the engine has given nothing back for {quiet_s:.0f}s (run.stall_s): {how} ended\n"
        os.write(2, text.encode())
        # A second time it is the call that does not notice.
        if not own or self._killed_here:
            self._end_process(EXIT_STALLED)
        self._killed_here = True
        for process in own:
            _kill_tree(process.pid)
        with self._changed:
            self._last_sign_s = time.monotonic()


def _kill_tree(pid: int | None) -> None:
    try:
        root = psutil.Process(pid)
        for process in (*root.children(recursive=True), root):
            process.kill()
    except psutil.NoSuchProcess:
        return


def _oom_kills() -> int:
    """How many processes the kernel of this machine has ended for want of memory; 0 if unknown."""
    try:
        with open("/proc/vmstat") as file:
            counters = dict(line.split() for line in file)
    except OSError:
        return 0
    return int(counters.get("oom_kill", 0))
