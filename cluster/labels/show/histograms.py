"""Formats distributions for a terminal: quantiles and a histogram, one line each."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from schemas.console.text import table

BARS = " ▁▂▃▄▅▆▇█"
HISTOGRAM_BINS = 24
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def histogram(values: npt.NDArray[np.float64], bins: int = HISTOGRAM_BINS) -> str:
    """One bar per bin of equal width, from the lowest value to the highest."""
    low, high = float(values.min()), float(values.max())
    counts, _ = np.histogram(values, bins=bins, range=(low, high if high > low else low + 1))
    # Rounded up, so that every bin with a value shows a bar.
    levels = np.ceil((len(BARS) - 1) * counts / counts.max()).astype(int)
    return "".join(BARS[level] for level in levels)


def distribution_table(distributions: Mapping[str, npt.NDArray[np.float64]]) -> str:
    """Formats count, mean, quantiles and histogram of each non-empty distribution."""
    head = ("", "n", "mean", *(f"{q:.0%}" for q in QUANTILES), "lowest to highest")
    lines = []
    for name, values in distributions.items():
        if not len(values):
            continue
        numbers = [float(values.mean()), *np.quantile(values, QUANTILES)]
        lines.append(
            (name, f"{len(values):,}", *(f"{x:.4g}" for x in numbers), f"|{histogram(values)}|")
        )
    return table(head, lines, right=range(1, 3 + len(QUANTILES)))
