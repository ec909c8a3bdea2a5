"""The line that a labelling run shows."""

import io
from typing import Any

import pytest

from labeler.run.actors.run_state import RunState
from schemas.console.progress import Progress


def state(**changes: Any) -> RunState:
    values = {
        "bytes_read": 50,
        "bytes_total": 100,
        "rows_found": 10,
        "rows_done": 5,
        "tokens_done": 1000,
    }
    return RunState(**{**values, **changes})


def test_share_done_counts_what_is_still_unread() -> None:
    assert state().share_done() == pytest.approx(0.25)
    assert state(bytes_read=100, rows_done=10).share_done() == 1.0
    assert state(rows_done=30).share_done() == pytest.approx(0.5)  # of an earlier run's claims
    assert state(bytes_read=0, rows_found=0, rows_done=0).share_done() == 0.0
    assert state(bytes_total=0, rows_found=0, rows_done=0).share_done() == 1.0


def test_line_has_rows_share_of_the_corpus_speed_and_time_left() -> None:
    now = [0.0]
    stream = io.StringIO()
    with Progress("label", stream=stream, clock=lambda: now[0]) as progress:
        now[0] = 5.0
        state(rows_done=2, tokens_done=400).show(progress)  # a tenth of everything
        now[0] = 15.0
        state().show(progress)  # 15% took 10 s, 75% are left
    assert stream.getvalue().splitlines()[-1] == (
        "label: labelled 5 of 10 rows found | corpus read 50% | 60 tokens/s | 50s left"
    )


def test_line_counts_responses_where_some_are_generated() -> None:
    stream = io.StringIO()
    with Progress("label", stream=stream) as progress:
        state(num_generated=1234).show(progress)
    assert "corpus read 50% | 1,234 responses generated" in stream.getvalue()


def test_line_is_short_once_the_corpus_is_read() -> None:
    stream = io.StringIO()
    with Progress("label", stream=stream) as progress:
        state(bytes_read=100).show(progress)
    assert stream.getvalue() == "label: labelled 5 of 10 rows\n"
