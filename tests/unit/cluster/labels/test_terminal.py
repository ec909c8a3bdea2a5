"""Tables, sizes and histograms of `tutelage labels`, and its progress line."""

import sys
from typing import Any

import numpy as np
import pytest

from cluster.labels.commands import _Progress
from cluster.labels.terminal import distribution_lines, histogram, size_text, table
from schemas.errors import StoreError
from schemas.storage.store import Store


def test_tables_line_up() -> None:
    shown = table(("name", "n"), [("a", "10"), ("longer", "2")], right=(1,))
    assert shown.splitlines() == ["name     n", "a       10", "longer   2"]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (75.6e6, "75.6 MB"), (2e15, "2000.0 TB")],
)
def test_sizes(size: float, text: str) -> None:
    assert size_text(size) == text


def test_histograms() -> None:
    assert histogram(np.array([0.0, 1.0, 1.0]), bins=2) == "▄█"
    assert histogram(np.array([3.0, 3.0]), bins=3) == "█  "
    lines = distribution_lines([("x", np.arange(101.0)), ("none", np.empty(0))]).splitlines()
    assert len(lines) == 2
    assert lines[1].split()[:3] == ["x", "101", "50"]


def test_progress_says_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("cluster.labels.commands.time.monotonic", lambda: now[0])
    progress = _Progress("verify")
    for seconds, done in ((1.0, 1e6), (10.0, 10e6), (11.0, 11e6), (20.0, 20e6)):
        now[0] = seconds
        progress.show(int(done), int(40e6))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "verify: 10 of 40 MB, 30 s left",
        "verify: 20 of 40 MB, 20 s left",
    ]


def test_a_missing_driver_names_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(sys.modules["fsspec"].core, "url_to_fs", refuse)
    with pytest.raises(StoreError, match=r"pip install 'tutelage\[s3\]'"):
        Store("s3://bucket/labels")
