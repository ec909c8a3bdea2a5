"""What a run shows while it goes: rows, speed, time left."""

import sys
import time
from dataclasses import dataclass
from typing import TextIO

REDRAW_S = 1.0
LINE_S = 15.0  # between lines where there is no terminal to redraw


@dataclass(frozen=True)
class RunState:
    """How far a run is, all of it as the ledger knows it.

    Attributes:
        bytes_read, bytes_total: Of the corpus.
        rows_sent: Rows found so far that have to be labelled.
        rows_done: Of these, labelled or quarantined.
        tokens_done, labels_done: In the units that are done.
    """

    bytes_read: int
    bytes_total: int
    rows_sent: int
    rows_done: int
    tokens_done: int
    labels_done: int

    def share_done(self) -> float:
        """Estimated share of the whole work that is done, in [0, 1].

        What is read tells how many rows the rest of the corpus will send.
        """
        read = self.bytes_read / self.bytes_total if self.bytes_total else 1.0
        labelled = min(self.rows_done / self.rows_sent, 1.0) if self.rows_sent else 1.0
        return min(read * labelled, 1.0)


class Progress:
    """Writes one line about a run again and again; to a terminal in place."""

    def __init__(self, stream: TextIO | None = None, enabled: bool = True) -> None:
        self._stream = stream or sys.stderr
        self._enabled = enabled
        self._terminal = self._stream.isatty()
        self._shown = time.monotonic()
        self._base: tuple[float, RunState] | None = None

    def show(self, state: RunState) -> None:
        """Shows the state if it is time to."""
        now = time.monotonic()
        if self._base is None and state.rows_done:
            self._base = now, state  # speed counts from here: starting an engine takes its time
        if not self._enabled or now - self._shown < (REDRAW_S if self._terminal else LINE_S):
            return
        self._shown = now
        line = describe(state, now, *(self._base or (now, state)))
        self._stream.write(f"\r\x1b[K{line}" if self._terminal else f"{line}\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """Writes a line that stays."""
        if self._enabled:
            self._stream.write(f"\r\x1b[K{text}\n" if self._terminal else f"{text}\n")
            self._stream.flush()


def describe(state: RunState, now_s: float, base_s: float, base: RunState) -> str:
    """One line: rows, share of the corpus, tokens a second, time left.

    Args:
        state: How far the run is now.
        now_s: When that is, in seconds of any clock.
        base_s: An earlier moment, from which on speed is counted.
        base: How far the run was then.
    """
    read = 100 * state.bytes_read / state.bytes_total if state.bytes_total else 100.0
    parts = [f"labelled {state.rows_done:,} of {state.rows_sent:,} rows found"]
    parts.append(f"corpus read {read:.0f}%")
    elapsed, gained = now_s - base_s, state.share_done() - base.share_done()
    if elapsed > 0 and gained > 0:
        parts.append(f"{(state.tokens_done - base.tokens_done) / elapsed:,.0f} tokens/s")
        left = elapsed * (1 - state.share_done()) / gained
        parts.append(f"about {duration(left)} left")
    return " | ".join(parts)


def duration(seconds: float) -> str:
    """Seconds for people: 42s, 3m05s, 2h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
