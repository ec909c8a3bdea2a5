"""Histograms and quantiles on a terminal."""

import numpy as np

from cluster.labels.show.histograms import distribution_table, histogram


def test_histograms() -> None:
    assert histogram(np.array([0.0, 1.0, 1.0]), bins=2) == "▄█"
    assert histogram(np.array([3.0, 3.0]), bins=3) == "█  "
    lines = distribution_table({"x": np.arange(101.0), "none": np.empty(0)}).splitlines()
    assert len(lines) == 2
    assert lines[1].split()[:3] == ["x", "101", "50"]
