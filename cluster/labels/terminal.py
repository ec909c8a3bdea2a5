"""Tables, sizes and small histograms for a terminal."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

BARS = " ▁▂▃▄▅▆▇█"
HISTOGRAM_BINS = 24
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def table(head: Sequence[str], lines: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns as wide as they have to be; those numbered in `right` end at the right."""
    rows = [tuple(head), *(tuple(line) for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def size_text(size_bytes: float) -> str:
    """Bytes in the largest unit that leaves at least one."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def histogram(values: npt.NDArray[np.float64], bins: int = HISTOGRAM_BINS) -> str:
    """One line: bars over equal steps from the lowest value to the highest."""
    low, high = float(values.min()), float(values.max())
    counts, _ = np.histogram(values, bins=bins, range=(low, high if high > low else low + 1))
    top = len(BARS) - 1
    levels = np.ceil(top * counts / counts.max()).astype(int)
    return "".join(BARS[level] for level in levels)


def distribution_lines(
    distributions: Sequence[tuple[str, npt.NDArray[np.float64]]],
) -> str:
    """A table: name, number, mean, quantiles, and a histogram over its range, for each."""
    head = ("", "n", "mean", *(f"{q:.0%}" for q in QUANTILES), "lowest to highest")
    lines = []
    for name, values in distributions:
        if not len(values):
            continue
        numbers = [float(values.mean()), *np.quantile(values, QUANTILES)]
        lines.append(
            (name, f"{len(values):,}", *(f"{x:.4g}" for x in numbers), f"|{histogram(values)}|")
        )
    return table(head, lines, right=range(1, 3 + len(QUANTILES)))
