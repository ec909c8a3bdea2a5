"""`tutelage labels report`: one HTML file with everything in it, to look at and to send on."""

import html
from collections.abc import Iterator, Sequence
from typing import Any

from cluster.labels.report import measures, plots
from cluster.labels.show.show import RUN_COLUMNS, run_accounts, run_lines, summary
from cluster.labels.terminal import size_text
from schemas.label_set.label_set import LabelSet
from schemas.label_set.manifest import Manifest
from schemas.maintenance.listing import record_text, teacher_text
from schemas.maintenance.sample import SampledGroup, distributions, sample_groups
from schemas.storage.store import Store

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; color: #222; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; }
td, th { padding: 0.15rem 0.7rem; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child { text-align: left; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(24rem, 1fr)); gap: 1rem; }
svg { width: 100%; height: auto; }
code { font-size: 12px; }
"""
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


def write_report(url: str, out: str, num_groups: int, seed: int) -> dict[str, Any]:
    """Writes the report of a label set; returns its numbers.

    Raises:
        StoreError: there is no label set, it is damaged, or the file cannot be written.
    """
    label_set = LabelSet.open(url)
    manifests = label_set.manifests()
    groups = sample_groups(label_set, num_groups, seed)
    values = distributions(groups)
    columns, footers = measures.bytes_by_column(label_set, seed)
    found = measures.calibration(groups)
    sections = [
        f"<h1>{html.escape(label_set.url)}</h1>",
        _facts(label_set, manifests),
        _runs(label_set),
        f"<h2>Labels</h2><p>{_sample_line(groups, seed)}</p>",
        _quantiles({name: summary(part) for name, part in values.items()}),
        '<div class="plots">',
        *(
            plots.histogram(part, name, _UNITS[name], log_x=name == "target rank")
            for name, part in values.items()
        ),
        plots.calibration(found) if found else "",
        "</div><h2>Storage and time</h2>",
        f"<p>Compressed bytes from the footers of {footers} shards.</p>",
        '<div class="plots">',
        *_storage_and_time(label_set, manifests, columns),
        "</div>",
    ]
    _write(out, label_set, sections)
    return {
        "url": url,
        "out": out,
        "ece": found.ece if found else None,
        "bytes_per_label_by_column": columns,
        "distributions": {name: summary(part) for name, part in values.items()},
    }


def _storage_and_time(
    label_set: LabelSet, manifests: list[Manifest], columns: dict[str, float]
) -> Iterator[str]:
    if columns:
        total = sum(columns.values())
        title = f"bytes a label by column, {total:.1f} in all"
        yield plots.bars(columns, title, "bytes a label, compressed")
    units = measures.units_over_time(label_set, manifests)
    if units:
        yield plots.throughput(units)
        yield plots.progress(units)


def _sample_line(groups: list[SampledGroup], seed: int) -> str:
    labels = sum(group.rows.num_labels for group in groups)
    rows = sum(len(group.rows) for group in groups)
    return (
        f"{len(groups)} row groups drawn with seed {seed}: {rows:,} rows, {labels:,} labels. "
        "Dashed lines are medians."
    )


def _facts(label_set: LabelSet, manifests: list[Manifest]) -> str:
    labels = sum(manifest.num_labels for manifest in manifests)
    size = sum(manifest.size_bytes for manifest in manifests)
    teacher = label_set.spec.teacher
    lines = [
        ("fingerprint", label_set.fingerprint),
        ("record", record_text(label_set.spec.record)),
        ("teacher", teacher_text(label_set, manifests)),
        ("weights digest", teacher.weights_digest or "none"),
        ("numerics", f"{teacher.dtype}, head {teacher.head_dtype}"),
        ("vocabulary", f"{teacher.vocab_size:,} ids"),
        ("units", f"{len(manifests):,}"),
        ("rows", f"{sum(m.num_rows for m in manifests):,}"),
        ("tokens", f"{sum(m.num_tokens for m in manifests):,}"),
        ("labels", f"{labels:,}"),
        ("quarantined", f"{len(label_set.quarantine()):,}"),
        ("size", f"{size_text(size)}, {size / labels if labels else 0:.1f} bytes a label"),
    ]
    return _table((), lines)


def _runs(label_set: LabelSet) -> str:
    lines = run_lines(run_accounts(label_set))
    table = _table(RUN_COLUMNS, lines) if lines else "<p>No finished run.</p>"
    return f"<h2>Runs</h2>{table}"


def _quantiles(found: dict[str, dict[str, float]]) -> str:
    if not found:
        return ""
    names = list(next(iter(found.values())))
    lines = [(name, *(f"{numbers[one]:,.6g}" for one in names)) for name, numbers in found.items()]
    return _table(("", *names), lines)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>"] if head else []
    for line in lines:
        rows.append(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _write(out: str, label_set: LabelSet, sections: Sequence[str]) -> None:
    title = html.escape(f"labels {label_set.url}")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )
    folder, slash, name = out.rpartition("/")
    Store(folder if slash else ".").write_bytes(name, page.encode())
