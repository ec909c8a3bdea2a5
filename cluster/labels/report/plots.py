"""Draws the plots of a report as SVG elements for an HTML page."""

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.labels.report.measures import Calibration, UnitsOverTime

_SIZE = (4.6, 2.9)
_BLUE, _GREY = "#3565a8", "#999999"

Values = npt.NDArray[np.float64]


def histogram(values: Values, title: str, unit: str, log_x: bool = False) -> str:
    """Share of values in each of 50 bins of equal width or, with `log_x`, equal ratio."""

    def draw(axes: Any) -> None:
        bins: Any = 50
        if log_x:
            bins = np.geomspace(1, max(float(values.max()), 2.0), 50)
            axes.set_xscale("log")
        axes.hist(values, bins=bins, color=_BLUE, weights=np.full(len(values), 1 / len(values)))
        axes.axvline(float(np.median(values)), color=_GREY, linestyle="--", linewidth=1)
        axes.set_xlabel(unit)
        axes.set_ylabel("share")

    return _svg(title, draw)


def calibration(found: Calibration) -> str:
    """Accuracy against confidence; dot areas show the bins' shares of the labels."""

    def draw(axes: Any) -> None:
        share = found.counts / found.counts.sum()
        axes.plot([0, 1], [0, 1], color=_GREY, linestyle="--", linewidth=1)
        axes.plot(found.confidence, found.accuracy, color=_BLUE, linewidth=1)
        axes.scatter(found.confidence, found.accuracy, s=10 + 400 * share, color=_BLUE, alpha=0.6)
        axes.set_xlabel("confidence: probability of the teacher's top token")
        axes.set_ylabel("accuracy: how often it is the real token")

    return _svg(f"calibration of the teacher, ECE {100 * found.ece:.1f}%", draw)


def bars(values: Mapping[str, float], title: str, unit: str) -> str:
    """One horizontal bar per value, the first on top."""

    def draw(axes: Any) -> None:
        names = list(values)[::-1]
        shown = axes.barh(names, [values[name] for name in names], color=_BLUE)
        axes.bar_label(shown, fmt="%.2f", fontsize=7, padding=2)
        axes.margins(x=0.15)
        axes.tick_params(axis="y", labelsize=7)
        axes.set_xlabel(unit)

    return _svg(title, draw)


def throughput(units: UnitsOverTime) -> str:
    """Tokens per second of each unit against its commit time."""

    def draw(axes: Any) -> None:
        axes.plot(units.minutes, units.tokens / units.seconds, ".", color=_BLUE)
        _label_time(axes, "teacher tokens per second")

    return _svg("units over time", draw)


def progress(units: UnitsOverTime) -> str:
    """Committed tokens against time."""

    def draw(axes: Any) -> None:
        axes.step(units.minutes, np.cumsum(units.tokens), where="post", color=_BLUE)
        _label_time(axes, "tokens committed")

    return _svg("tokens over time", draw)


def _label_time(axes: Any, y_label: str) -> None:
    axes.set_ylim(bottom=0)
    axes.set_xlabel("minutes since the first commit")
    axes.set_ylabel(y_label)


def _svg(title: str, draw: Callable[[Any], None]) -> str:
    """Renders one plot as SVG: text stays text, and equal values give equal bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    # Figure instead of pyplot, which would keep every figure in memory.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 8}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.25)
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    text = target.getvalue()
    return text[text.index("<svg") :]
