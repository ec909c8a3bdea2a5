"""`tutelage labels report`: writes a self-contained HTML file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cluster.labels.facts import RUN_COLUMNS, label_set_facts, run_accounts, run_lines, summary
from cluster.labels.report import measures, plots
from cluster.output_file import write_file
from schemas.console.progress import ProgressCallback
from schemas.label_set.label_set import LabelSet
from schemas.maintenance.sample import distributions, sample_groups

_UNITS = {
    "tokens a row": "tokens",
    "labels a row": "labels",
    "entries a label": "entries",
    "of the head": "exact entries a label",
    "of draws": "draws a label",
    "covered mass": "probability that the exact head covers",
    "target logprob": "nats",
    "target rank": "rank of the real token",
    "entropy": "nats",
}
# Values are escaped, because a URL or a teacher's name may contain anything.
_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
)


def write_report(
    url: str,
    out: str,
    num_groups: int,
    seed: int,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Writes the report of a label set and returns its numbers.

    Args:
        url: the label set.
        out: HTML file to write; any fsspec URL.
        num_groups: row groups to sample.
        seed: seed of the sample.
        progress: called with the number of row groups read so far, and in the sample.

    Raises:
        StoreError: the label set does not exist or is damaged, or the file cannot be written.
    """
    label_set = LabelSet.open(url)
    groups = sample_groups(label_set, num_groups, seed, progress)
    values = distributions(groups)
    summaries = {name: summary(part) for name, part in values.items()}
    columns, num_footers = measures.bytes_by_column(label_set, seed)
    calibration = measures.calibration(groups)
    page = _TEMPLATES.get_template("report.html.jinja").render(
        url=label_set.url,
        facts=label_set_facts(label_set),
        run_columns=RUN_COLUMNS,
        runs=run_lines(run_accounts(label_set)),
        seed=seed,
        groups=groups,
        summaries=summaries,
        label_plots=_label_plots(values, calibration),
        num_footers=num_footers,
        storage_plots=_storage_plots(label_set, columns),
    )
    write_file(out, page)
    return {
        "url": url,
        "out": out,
        "ece": calibration.ece if calibration else None,
        "bytes_per_label_by_column": columns,
        "distributions": summaries,
    }


def _label_plots(
    values: Mapping[str, npt.NDArray[np.float64]], calibration: measures.Calibration | None
) -> list[str]:
    drawn = [
        plots.histogram(part, name, _UNITS[name], log_x=name == "target rank")
        for name, part in values.items()
    ]
    return [*drawn, plots.calibration(calibration)] if calibration else drawn


def _storage_plots(label_set: LabelSet, columns: Mapping[str, float]) -> list[str]:
    drawn = []
    if columns:
        title = f"bytes a label by column, {sum(columns.values()):.1f} in all"
        drawn.append(plots.bars(columns, title, "bytes a label, compressed"))
    units = measures.units_over_time(label_set)
    if len(units.tokens):
        drawn += [plots.throughput(units), plots.progress(units)]
    return drawn
