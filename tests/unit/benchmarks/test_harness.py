"""The harness of the benchmarks: result files, and what counts as peak memory."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness import MIB, PACKAGES, RESULTS, command_line, peak_bytes, write_results


def test_result_file_traces_figures_to_their_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "out.json"
    monkeypatch.setattr("sys.argv", ["loss", "--json", str(path), "--turns", "3"])
    parser = command_line("loss", "about")
    parser.add_argument("--turns", type=int)
    write_results(parser.parse_args(), {"ratio": 1.0})
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["name"] == "loss"
    assert content["command"] == f"python -m benchmarks.loss --json {path} --turns 3"
    assert content["settings"] == {"turns": 3}
    assert content["results"] == {"ratio": 1.0}
    assert content["machine"]["cores"] >= 1
    assert content["machine"]["cpu"]
    assert {"torch", "pyarrow"} <= set(content["versions"]) <= {"python", *PACKAGES}
    assert content["date"].count("-") == 2


def test_result_file_is_named_after_the_benchmark_by_default() -> None:
    assert command_line("step", None).parse_args([]).json == RESULTS / "step.json"


def test_peak_counts_memory_that_was_freed_again_and_not_what_was_held() -> None:
    held = np.ones(64 * MIB, np.uint8)
    peak = peak_bytes(lambda: np.ones(32 * MIB, np.uint8).sum())
    # The kernel adds up resident pages in batches, so the last few are missing.
    assert 31 * MIB <= peak < 48 * MIB
    assert held.any()
