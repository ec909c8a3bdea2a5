"""Progress of a long command: a bar on a terminal, a plain line every few seconds in a log."""

import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self, TextIO

from schemas.console.text import duration_text

LINE_INTERVAL_S = 10.0
"""Seconds between log lines where no terminal can redraw a bar."""


ProgressCallback = Callable[[int, int], None]
"""Called as ``callback(done, total)``, both in the same unit."""


class Progress:
    """Shows the progress of one command on standard error. A context manager.

    Speed and time left are measured from the first state with work done, so that engine start-up
    and work of an earlier run do not distort them. Not thread-safe: callers must serialize calls.
    """

    def __init__(
        self,
        name: str,
        *,
        stream: TextIO | None = None,
        enabled: bool = True,
        brief: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            name: the command; starts every line.
            stream: where to write; standard error by default.
            enabled: False writes nothing at all.
            brief: for commands that usually take seconds: logs nothing if the command ends within
                the first interval, and removes the bar from the terminal at the end.
            clock: monotonic time in seconds.
        """
        self._name, self._clock, self._enabled = name, clock, enabled
        self._stream = stream if stream is not None else sys.stderr
        on_terminal = enabled and self._stream.isatty()
        self._bar = _bar(name, self._stream, transient=brief) if on_terminal else None
        self._keeps_last_state = not brief
        self._base: tuple[float, float, int] | None = None  # time, done, tokens
        self._line_at = clock()
        self._unwritten = ""

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._unwritten and self._keeps_last_state:
            self._write(self._unwritten)  # the last line of a log shows the final state

    def show(
        self,
        done: float,
        total: float,
        what: str,
        *,
        tokens: int | None = None,
        facts: Sequence[str] = (),
    ) -> None:
        """Shows a state; cheap to call often.

        Args:
            done: work finished, in any unit.
            total: all work, in the same unit; may change from call to call.
            what: the same in words, such as "labelled 511 of 1,581 rows".
            tokens: tokens finished so far, for the speed; None shows no speed.
            facts: further short texts, such as "loss 2.0766".
        """
        if not self._enabled:
            return
        now = self._clock()
        if self._base is None and done > 0:
            self._base = now, done, tokens or 0
        parts = [what, *facts, *self._pace(now, done, total, tokens)]
        share = min(done / total, 1.0) if total > 0 else 1.0
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=share, state="  ".join(parts))
        elif now - self._line_at >= LINE_INTERVAL_S:
            self._line_at = now
            self._write(f"{self._name}: {' | '.join(parts)}")
        else:
            self._unwritten = f"{self._name}: {' | '.join(parts)}"

    def say(self, text: str) -> None:
        """Writes a line that stays above the bar."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def _pace(self, now: float, done: float, total: float, tokens: int | None) -> list[str]:
        if self._base is None:
            return []
        elapsed, gained = now - self._base[0], done - self._base[1]
        if elapsed <= 0 or gained <= 0:
            return []
        speed = [] if tokens is None else [f"{(tokens - self._base[2]) / elapsed:,.0f} tokens/s"]
        if done >= total:
            return speed
        return [*speed, f"{duration_text(elapsed * (total - done) / gained)} left"]

    def _write(self, line: str) -> None:
        self._unwritten = ""
        self._keeps_last_state = True
        print(line, file=self._stream, flush=True)


def _bar(name: str, stream: TextIO, transient: bool) -> Any:
    from rich import progress
    from rich.console import Console
    from rich.table import Column

    # Without widths, a terminal of 80 columns would cut the bar and keep the longest texts.
    bar = progress.Progress(
        progress.TextColumn(
            "{task.description}", markup=False, table_column=Column(min_width=len(name))
        ),
        progress.BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=10)),
        progress.TaskProgressColumn(table_column=Column(min_width=4)),
        progress.TextColumn(
            "{task.fields[state]}", markup=False, table_column=Column(ratio=6, no_wrap=True)
        ),
        console=Console(file=stream),
        transient=transient,
        expand=True,
    )
    bar.add_task(name, total=1.0, state="")
    return bar
