"""Candidate rows of a view, with their places and kept source columns.

Reads rosters and key files; opens no shard.
"""

import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import StoreError
from schemas.label_set.label_set import LabelSet
from schemas.label_set.roster import finished_runs, read_roster
from schemas.label_set.tables import key_array, required_fields
from schemas.record.key_columns import KEY_TYPE, key_column
from schemas.views.view import VIEW, labelled_rows

ROWS = pa.schema(
    [
        *VIEW,
        *required_fields(
            document=KEY_TYPE,
            place=pa.int64(),
            window=pa.int32(),
            sample=pa.int32(),
            columns=pa.string(),
        ),
    ]
)
"""VIEW, and: document (row key of the document's first window); place, window and sample in the
source; columns (the kept source columns as JSON)."""

FILTER_COLUMNS = (
    "source", "place", "window", "sample", "num_tokens", "num_labels", "label_set", "run", "shard",
)  # fmt: skip
"""Columns that `--where` can use in addition to kept source columns."""


@dataclass(frozen=True)
class SourceRun:
    """A closed run of a label set.

    Attributes:
        label_set: the label set.
        run: identity of the run.
        given: index of the `--from` argument that named it.
    """

    label_set: LabelSet
    run: str
    given: int


def open_sources(names: list[str]) -> list[SourceRun]:
    """Opens the runs named by `URL:RUN`, or by `URL` for all closed runs, in order.

    Raises:
        StoreError: a label set or run does not exist, or a set has no closed run.
    """
    found: list[SourceRun] = []
    for given, name in enumerate(names):
        url, run = _split(name)
        label_set = LabelSet.open(url)
        runs = finished_runs(label_set)
        if run and run not in runs:
            raise StoreError(f"{url}: no finished run {run}; finished runs: {', '.join(runs)}")
        if not runs:
            raise StoreError(f"{url}: no finished run, hence no roster to select rows from")
        found.extend(SourceRun(label_set, one, given) for one in ([run] if run else runs))
    return found


def candidate_rows(number: int, source: SourceRun, index: pa.Table) -> pa.Table:
    """The ROWS table of a run, sorted by place in the label set.

    Args:
        number: value of the column `label_set`.
        source: the run.
        index: index of its label set.

    Raises:
        StoreError: a row of the run is no longer in the label set.
    """
    roster = read_roster(source.label_set, source.run)
    roster = roster.append_column("document", _documents(roster))
    return labelled_rows(number, source.label_set, source.run, roster, index, ROWS)


def filter_table(rows: pa.Table, sources: list[SourceRun], names: set[str]) -> pa.Table:
    """The columns for a filter; parses kept source columns only if `names` needs them."""
    runs = pa.array([source.run for source in sources], pa.string())
    urls = pa.array([source.label_set.url for source in sources], pa.string())
    number = rows.column("label_set")
    columns = {name: rows.column(name) for name in FILTER_COLUMNS if name in rows.column_names}
    columns["run"] = runs.take(number)
    columns["label_set"] = urls.take(number)
    columns["shard"] = rows.column("shard").cast(pa.string())
    if not names <= set(FILTER_COLUMNS):
        for name, values in _kept_columns(rows.column("columns")).items():
            columns.setdefault(name, values)
    return pa.table(columns)


def _split(name: str) -> tuple[str, str]:
    """Splits URL:RUN; a colon before a slash belongs to the URL."""
    url, colon, run = name.rpartition(":")
    return (url, run) if colon and url and "/" not in run else (name, "")


def _documents(roster: pa.Table) -> pa.Array:
    """For each row, the row key of its document's first window or response.

    Identifies documents by content instead of place, so that a document stays on its side of a
    split when the corpus is shuffled or files are renamed. Relies on rosters being sorted by place.
    """
    keys = key_array(roster, "row_key")
    if not len(keys):
        return pa.array([], KEY_TYPE)
    first = np.ones(len(keys), bool)
    if len(keys) > 1:
        again = pc.and_(
            pc.equal(roster.column("source")[1:], roster.column("source")[:-1]),
            pc.equal(roster.column("place")[1:], roster.column("place")[:-1]),
        )
        first[1:] = ~np.asarray(again.to_numpy(), bool)
    return key_column(keys[np.flatnonzero(first)[np.cumsum(first) - 1]])


def _kept_columns(packed: pa.ChunkedArray) -> dict[str, pa.Array]:
    """Parses JSON objects into typed columns; values without a common type become JSON text."""
    rows = [json.loads(text) if text else {} for text in packed.to_pylist()]
    names = sorted({name for row in rows for name in row})
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            found = pa.array(values)
            nested = pa.types.is_nested(found.type)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            nested = True
        if nested:
            found = pa.array([None if v is None else json.dumps(v) for v in values], pa.string())
        columns[name] = found
    return columns
