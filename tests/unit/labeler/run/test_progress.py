"""The line that a run shows."""

import io

import pytest

from labeler.run.progress import Progress, RunState, describe, duration


def state(**changes: int) -> RunState:
    values = {
        "bytes_read": 50,
        "bytes_total": 100,
        "rows_sent": 10,
        "rows_done": 5,
        "tokens_done": 1000,
        "labels_done": 900,
    }
    return RunState(**{**values, **changes})


def test_share_done_counts_what_is_still_unread() -> None:
    assert state().share_done() == pytest.approx(0.25)
    assert state(bytes_read=100, rows_done=10).share_done() == 1.0
    assert state(rows_done=30).share_done() == pytest.approx(0.5)  # of pieces still being read
    assert state(bytes_read=0, rows_sent=0, rows_done=0).share_done() == 0.0
    assert state(bytes_total=0, rows_sent=0, rows_done=0).share_done() == 1.0


def test_the_line_has_speed_and_time_left() -> None:
    before = state(rows_done=2, tokens_done=400)  # a tenth of the whole
    line = describe(state(), 15.0, 5.0, before)
    assert "labelled 5 of 10 rows found" in line
    assert "corpus read 50%" in line
    assert "60 tokens/s" in line
    assert "about 50s left" in line  # 15% took 10 s, 75% are left
    first = describe(state(), 5.0, 5.0, state())
    assert first == "labelled 5 of 10 rows found | corpus read 50%"


def test_durations_for_people() -> None:
    assert [duration(s) for s in (0.4, 59, 60, 3599, 3600, 7660)] == [
        "0s", "59s", "1m00s", "59m59s", "1h00m", "2h07m",
    ]  # fmt: skip


def test_a_file_gets_few_lines_and_no_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("labeler.run.progress.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = Progress(stream)
    for second in range(60):
        now[0] = float(second)
        progress.show(state())
    progress.say("done")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[-1] == "done"
    assert "\x1b" not in stream.getvalue()


def test_a_disabled_one_says_nothing() -> None:
    stream = io.StringIO()
    progress = Progress(stream, enabled=False)
    progress.show(state())
    progress.say("done")
    assert stream.getvalue() == ""
