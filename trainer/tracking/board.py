"""From the workers to the person who waits: progress, notes, and the error that ended a run.

Ray Train's own reports are barriers and reach the driver late; errors arrive wrapped in the text of
remote tracebacks. A board, an actor without a CPU, holds the latest of each instead.
"""

import shutil
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from schemas.config import StrictModel
from schemas.errors import TutelageError

CLEAR_LINE = "\r\x1b[2K"
"""To the start of a terminal's line, and nothing in it."""


class Progress(StrictModel):
    """How far the run is.

    Attributes:
        step: global steps done, of ``num_steps``.
        loss: mean per label since the last line of metrics.jsonl.
        tokens_per_s: of all workers.
        data_wait_share: share of the time that training waited for data.
        seconds_left: at the pace so far.
    """

    step: int
    num_steps: int
    loss: float
    tokens_per_s: float
    data_wait_share: float
    seconds_left: float

    def line(self) -> str:
        """For a person to read."""
        return (
            f"step {self.step}/{self.num_steps}  loss {self.loss:.4f}  "
            f"{self.tokens_per_s:,.0f} tokens/s  {self.data_wait_share:.1%} waiting for data  "
            f"{_duration(self.seconds_left)} left"
        )

    def bar(self, width: int) -> str:
        """The same after a bar, in one line of a terminal of this width."""
        text, done = self.line(), self.step / max(self.num_steps, 1)
        room = min(width - len(text) - 10, 40)
        if room < 5:
            return text[: width - 1]
        filled = round(done * room)
        return f"{done:4.0%} [{'#' * filled}{'.' * (room - filled)}]  {text}"


class Board:
    """The actor's class: what the workers have to say."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._notes: list[str] = []
        self._error: TutelageError | None = None

    def progress(self, progress: Progress) -> None:
        """Replaces what was shown."""
        self._progress = progress

    def note(self, text: str) -> None:
        """Adds a line for the person who waits."""
        self._notes.append(text)

    def fail(self, error: TutelageError) -> None:
        """Keeps the first error; what follows on other workers is its consequence."""
        self._error = self._error or error

    def error(self) -> TutelageError | None:
        """The error that ended the run; there is no use in trying again."""
        return self._error

    def news(self, num_notes: int) -> tuple[Progress | None, list[str]]:
        """The latest progress, and the notes after the first ``num_notes``."""
        return self._progress, self._notes[num_notes:]


class Watcher:
    """Shows a board's news while a run goes on. A context manager.

    On a terminal a bar stays in the last line; elsewhere a line comes every few seconds.
    """

    INTERVAL_S = 1.0
    LINE_EVERY_S = 5.0

    def __init__(self, news: Callable[[int], tuple[Progress | None, list[str]]]) -> None:
        """
        Args:
            news: ``Board.news`` of the actor.
        """
        self._news, self._num_notes = news, 0
        self._shown: Progress | None = None
        self._shown_at = 0.0
        self._is_terminal = sys.stderr.isatty()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(self.INTERVAL_S):
            self._show(final=False)
        self._show(final=True)

    def _show(self, final: bool) -> None:
        try:
            progress, notes = self._news(self._num_notes)
        except Exception:  # noqa: BLE001  (a lost board must not end the run it shows)
            return
        self._num_notes += len(notes)
        for text in notes:
            show(f"{CLEAR_LINE}{text}" if self._is_terminal else text)
        if self._is_terminal:
            if progress is not None:
                width = shutil.get_terminal_size().columns
                end = "\n" if final else ""
                print(CLEAR_LINE + progress.bar(width), end=end, file=sys.stderr, flush=True)
            return
        due = final or time.monotonic() - self._shown_at >= self.LINE_EVERY_S
        if progress is not None and progress != self._shown and due:
            self._shown, self._shown_at = progress, time.monotonic()
            show(progress.line())


def show(text: str) -> None:
    """Prints a line for the person who waits."""
    print(text, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
