"""Progress: lines in a log, a bar on a terminal, speed and time left counted from real work."""

import contextlib
import io
import os
import pty

from schemas.console.progress import LINE_INTERVAL_S, Progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_log_gets_a_line_per_interval_and_the_last_state() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress("label", stream=stream, clock=clock) as progress:
        progress.show(0, 100, "0 of 100 rows", tokens=0)
        clock.now += 2 * LINE_INTERVAL_S
        progress.show(10, 100, "10 of 100 rows", tokens=1_000)
        clock.now += 10.0
        progress.show(20, 100, "20 of 100 rows", tokens=3_000, facts=("loss 0.5",))
        clock.now += 1.0
        progress.show(30, 100, "30 of 100 rows", tokens=4_000)
    assert stream.getvalue().splitlines() == [
        "label: 10 of 100 rows",
        "label: 20 of 100 rows | loss 0.5 | 200 tokens/s | 1m20s left",
        "label: 30 of 100 rows | 273 tokens/s | 38s left",
    ]


def test_work_of_an_earlier_run_does_not_count_into_the_speed() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress("train", stream=stream, clock=clock) as progress:
        progress.show(900, 1000, "step 900/1000")
        clock.now += 20.0
        progress.show(910, 1000, "step 910/1000")
    assert stream.getvalue() == "train: step 910/1000 | 3m00s left\n"


def test_brief_command_leaves_no_line_unless_it_takes_long() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress("verify", stream=stream, clock=clock, brief=True) as progress:
        progress.show(1, 2, "unit 1 of 2")
    assert stream.getvalue() == ""
    with Progress("verify", stream=stream, clock=clock, brief=True) as progress:
        for done in (1, 2, 3):
            clock.now += LINE_INTERVAL_S * 0.7
            progress.show(done, 3, f"unit {done} of 3")
    assert stream.getvalue().splitlines() == [
        "verify: unit 2 of 3 | 7s left",
        "verify: unit 3 of 3",
    ]


def test_no_total_shows_no_time_left_and_disabled_shows_nothing() -> None:
    stream, clock = io.StringIO(), Clock()
    for enabled in (True, False):
        with Progress("label", stream=stream, clock=clock, enabled=enabled) as progress:
            progress.show(0, 0, "no rows")
            progress.say("a note")
    assert stream.getvalue().splitlines() == ["a note", "label: no rows"]


def test_terminal_gets_a_bar_and_notes_above_it() -> None:
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as stream, Progress("evaluate", stream=stream) as progress:
        progress.show(1, 2, "row 1 of 2 [bold]", tokens=10)
        progress.say("a note with [brackets]")
    chunks = []
    with contextlib.suppress(OSError):  # EIO: the other end is closed and everything was read
        while chunk := os.read(leader, 65536):
            chunks.append(chunk)
    os.close(leader)
    written = b"".join(chunks).decode()
    assert "50%" in written
    assert "row 1 of 2 [bold]" in written
    assert "a note with [brackets]" in written
