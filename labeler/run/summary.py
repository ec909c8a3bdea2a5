"""The summary of a run, from its roster and its manifests."""

import pyarrow.compute as pc

from schemas.config import StrictModel
from schemas.keys import SortedKeys, contains, keys_to_sorted
from schemas.label_set.label_set import LabelSet
from schemas.label_set.manifest import Manifest
from schemas.label_set.roster import LABELLED, Accounts, read_roster
from schemas.label_set.tables import key_array


class LabelSummary(StrictModel):
    """What a label job did.

    Attributes:
        teacher_backend: Which engine labelled.
        run: Identity of the run; its roster has this name.
        rows_read: Windows of the corpus, or samples asked for. Equal to the sum of the next four.
        rows_labelled, rows_reused, rows_duplicate, rows_quarantined: What became of them.
        rows_generated: Of the labelled ones, how many were generated first.
        tokens, labels: Of the rows labelled by this run.
        bytes_per_label, ids_per_label: On disk, of the units that this run's rows are in, reused
            ones too; 0 if there are none.
        seconds: Wall time of the job, from reading the configuration on.
        labels_url, fingerprint: The label set.
        view: URL of the view, or empty.
        reasons: Rows in quarantine by reason.
        reduced: What the label set holds more of than was asked for, ``field: there / wanted``;
            the view promises what was asked for, which readers make of what is stored.
        announcements: What teachers of these units had to say of their labels.
    """

    teacher_backend: str
    run: str
    rows_read: int
    rows_labelled: int
    rows_reused: int
    rows_duplicate: int
    rows_quarantined: int
    rows_generated: int
    tokens: int
    labels: int
    bytes_per_label: float
    ids_per_label: float
    seconds: float
    labels_url: str
    view: str
    fingerprint: str
    reasons: dict[str, int]
    reduced: str = ""
    announcements: tuple[str, ...] = ()


def summarise(
    label_set: LabelSet, run: str, accounts: Accounts, backend: str, view: str, seconds: float
) -> LabelSummary:
    """The summary of a closed run."""
    roster = read_roster(label_set, run)
    labelled = roster.filter(pc.equal(roster.column("disposition"), LABELLED))
    generated = int(pc.sum(pc.greater_equal(labelled.column("sample"), 0), min_count=0).as_py())
    units = _units_of(label_set, keys_to_sorted(key_array(roster, "row_key")))
    labels = sum(unit.num_labels for unit in units)
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
        announcements=_announcements(units),
        **accounts.model_dump(),
    )


def _announcements(units: list[Manifest]) -> tuple[str, ...]:
    found = {str(unit.provenance.get("announcement", "")) for unit in units}
    return tuple(sorted(found - {""}))


def _units_of(label_set: LabelSet, rows: SortedKeys) -> list[Manifest]:
    """The units that hold any of the given rows."""
    index = label_set.index()
    here = contains(rows, key_array(index, "row_key"))
    units = set(pc.unique(index.column("unit_key").filter(here).cast("string")).to_pylist())
    return [manifest for manifest in label_set.manifests() if manifest.unit_key in units]
