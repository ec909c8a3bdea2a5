"""The summary of a run, from its roster and its manifests."""

import numpy as np
import pyarrow.compute as pc

from schemas.config import StrictModel
from schemas.keys import contains, keys_to_sorted
from schemas.label_set import LabelSet
from schemas.roster import LABELLED, Accounts, read_roster
from schemas.tables import key_array


class LabelSummary(StrictModel):
    """What a label job did.

    Attributes:
        teacher_backend: Which engine labelled.
        run: Identity of the run; its roster has this name.
        rows_read: Windows of the corpus, or samples asked for. Equal to the sum of the next four.
        rows_labelled, rows_reused, rows_duplicate, rows_quarantined: What became of them.
        rows_generated: Of the labelled ones, how many were generated first.
        tokens, labels: Of the rows labelled by this run.
        bytes_per_label: On disk, of the units that this run's labelled rows are in; 0 if there are
            none.
        seconds: Wall time of the job, from reading the configuration on.
        labels_url, fingerprint: The label set.
        view: URL of the view, or empty.
        reasons: Rows in quarantine by reason.
        reduced: What the label set holds more of than was asked for, ``field: there / wanted``;
            the view promises what was asked for, which readers make of what is stored.
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
    seconds: float
    labels_url: str
    view: str
    fingerprint: str
    reasons: dict[str, int]
    reduced: str = ""


def summarise(
    label_set: LabelSet, run: str, accounts: Accounts, backend: str, view: str, seconds: float
) -> LabelSummary:
    """The summary of a closed run."""
    roster = read_roster(label_set, run)
    labelled = roster.filter(pc.equal(roster.column("disposition"), LABELLED))
    generated = int(pc.sum(pc.greater_equal(labelled.column("sample"), 0), min_count=0).as_py())
    return LabelSummary(
        teacher_backend=backend,
        run=run,
        rows_generated=generated,
        bytes_per_label=_bytes_per_label(label_set, keys_to_sorted(key_array(labelled, "row_key"))),
        seconds=seconds,
        labels_url=label_set.url,
        view=view,
        fingerprint=label_set.fingerprint,
        **accounts.model_dump(),
    )


def _bytes_per_label(label_set: LabelSet, labelled: np.ndarray) -> float:
    """Size of the shards that hold the given rows, by label in them."""
    index = label_set.index()
    here = contains(labelled, key_array(index, "row_key"))
    units = set(pc.unique(index.column("unit_key").filter(here).cast("string")).to_pylist())
    shards = [manifest for manifest in label_set.manifests() if manifest.unit_key in units]
    labels = sum(manifest.num_labels for manifest in shards)
    return sum(manifest.size_bytes for manifest in shards) / labels if labels else 0.0
