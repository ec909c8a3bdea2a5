"""The summary of a run, computed from its roster and manifests."""

import pyarrow.compute as pc

from schemas.console.text import duration_text
from schemas.keys import SortedKeys, contains, keys_to_sorted
from schemas.label_set.label_set import LabelSet
from schemas.label_set.manifest import Manifest
from schemas.label_set.roster import LABELLED, Accounts, read_roster
from schemas.label_set.tables import key_array


class LabelSummary(Accounts):
    """Outcome of a label job.

    Attributes:
        teacher_backend: engine that computed the labels.
        run: run id, also the name of its roster.
        rows_generated: labelled rows with generated responses.
        bytes_per_label, ids_per_label: on disk, over all units that hold rows of this run,
            including reused ones; 0 without labels.
        seconds: wall time of the job, including reading the configuration.
        labels_url, fingerprint: identify the label set.
        view: URL of the view, or empty.
        reduced: the fields in which stored labels are richer than requested; readers of the view
            reduce the stored labels to the requested ones.
        announcements: remarks of teachers about the labels of these units.
    """

    teacher_backend: str
    run: str
    rows_generated: int
    bytes_per_label: float
    ids_per_label: float
    seconds: float
    labels_url: str
    view: str
    fingerprint: str
    reduced: str = ""
    announcements: tuple[str, ...] = ()


def summarise(
    label_set: LabelSet,
    run: str,
    accounts: Accounts,
    backend: str,
    view: str,
    seconds: float,
    reduced: str,
) -> LabelSummary:
    """Summarises a run whose roster is closed."""
    roster = read_roster(label_set, run)
    labelled = roster.filter(pc.equal(roster.column("disposition"), LABELLED))
    generated = int(pc.sum(pc.greater_equal(labelled.column("sample"), 0), min_count=0).as_py())
    units = _units_with(label_set, keys_to_sorted(key_array(roster, "row_key")))
    labels = sum(unit.num_labels for unit in units)
    # Every unit repeats its teacher's remark.
    announcements = {str(unit.provenance.get("announcement", "")) for unit in units} - {""}
    return LabelSummary(
        teacher_backend=backend,
        run=run,
        rows_generated=generated,
        bytes_per_label=sum(unit.size_bytes for unit in units) / labels if labels else 0.0,
        ids_per_label=sum(unit.num_entries for unit in units) / labels if labels else 0.0,
        seconds=seconds,
        labels_url=label_set.url,
        view=view,
        fingerprint=label_set.fingerprint,
        reduced=reduced,
        announcements=tuple(sorted(announcements)),
        **accounts.model_dump(),
    )


def _units_with(label_set: LabelSet, rows: SortedKeys) -> list[Manifest]:
    """The units that hold any of the given rows."""
    index = label_set.index()
    is_held = contains(rows, key_array(index, "row_key"))
    units = set(pc.unique(index.column("unit_key").filter(is_held).cast("string")).to_pylist())
    return [manifest for manifest in label_set.manifests() if manifest.unit_key in units]


def describe(summary: LabelSummary) -> list[str]:
    """Returns the final terminal lines of a label job."""
    lines = [
        f"{summary.rows_read:,} rows read = {summary.rows_labelled:,} labelled + "
        f"{summary.rows_reused:,} reused + {summary.rows_duplicate:,} duplicate + "
        f"{summary.rows_quarantined:,} quarantined, in {duration_text(summary.seconds)}"
    ]
    if summary.reduced:
        lines[0] += f"; reusing richer labels ({summary.reduced})"
    if summary.ids_per_label:
        lines.append(
            f"{summary.labels:,} new labels; {summary.ids_per_label:.1f} ids and "
            f"{summary.bytes_per_label:.1f} bytes per label on disk"
        )
    return [*lines, *(f"note: {announcement}" for announcement in summary.announcements)]
