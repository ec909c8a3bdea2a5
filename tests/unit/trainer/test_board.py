"""What a person sees while a run goes on."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from schemas.errors import DamagedError, StudentError
from trainer.run.launch import _start_board
from trainer.tracking.board import Board, Progress, Watcher

PROGRESS = Progress(
    step=120,
    num_steps=600,
    loss=3.21456,
    tokens_per_s=12345.6,
    data_wait_share=0.0123,
    seconds_left=3725,
)


def test_a_line_says_how_far_and_how_long() -> None:
    assert PROGRESS.line() == (
        "step 120/600  loss 3.2146  12,346 tokens/s  1.2% waiting for data  1 h 02 min left"
    )


def test_a_bar_fits_its_terminal() -> None:
    assert PROGRESS.bar(120).startswith(" 20% [")
    assert PROGRESS.bar(120).endswith(PROGRESS.line())
    for width in (20, 80, 100, 120, 200):
        assert len(PROGRESS.bar(width)) < width
    whole = PROGRESS.model_copy(update={"step": 600})
    assert "100% [####" in whole.bar(140)
    assert ".]" not in whole.bar(140)


def test_the_first_error_is_kept() -> None:
    board = Board()
    assert board.error() is None
    board.fail(DamagedError("the cause"))
    board.fail(StudentError("its consequence"))
    assert str(board.error()) == "the cause"


def test_the_board_is_on_the_drivers_node(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {}

    def remote(**given: Any) -> Any:
        options.update(given)
        return lambda kind: SimpleNamespace(remote=kind)

    here = SimpleNamespace(get_node_id=lambda: "ab" * 28)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: here)
    monkeypatch.setattr(ray, "remote", remote)
    assert isinstance(_start_board(), Board)
    assert options["scheduling_strategy"].node_id == "ab" * 28
    assert not options["scheduling_strategy"].soft


def test_notes_are_shown_once_and_the_last_progress_always(
    capsys: pytest.CaptureFixture[str],
) -> None:
    board = Board()
    board.note("one")
    board.note("two")
    with Watcher(board.news):
        board.progress(PROGRESS)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["one", "two", PROGRESS.line()]


def test_a_lost_board_does_not_end_the_run() -> None:
    def lost(_: int) -> tuple[None, list[str]]:
        raise ConnectionError

    with Watcher(lost):
        pass
