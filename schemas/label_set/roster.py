"""Rosters: every row that a run read, and its disposition.

During a run, each task that reads a piece of the corpus writes a part, named after the places it
read, so that a retried task overwrites its own part. At the end, the parts are merged into one
roster, ordered by place. Dispositions follow from the keys committed before the run and from the
manifests, never from counters in tasks.
"""

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from schemas.config import StrictModel
from schemas.errors import AccountsError, DamagedError, MissingError, RecordError
from schemas.fault_points import fault_point
from schemas.keys import KEY_BYTES, SortedKeys, as_strings, contains, digest, find_keys
from schemas.label_set.label_set import LabelSet
from schemas.label_set.tables import (
    first_occurrences,
    key_array,
    parse_table,
    required_fields,
    table_bytes,
)
from schemas.record.key_columns import KEY_TYPE
from schemas.record.spans import Bools
from schemas.storage.store import Store

LABELLED = "labelled"
REUSED = "reused"
DUPLICATE = "duplicate"
QUARANTINED = "quarantined"

PLACE_COLUMNS = ("source", "place", "window", "sample")
ROSTER = pa.schema(
    required_fields(
        row_key=KEY_TYPE,
        source=pa.string(),
        place=pa.int64(),
        window=pa.int32(),
        sample=pa.int32(),
        disposition=pa.string(),
        reason=pa.string(),
        columns=pa.string(),
    )
)
"""Columns: row_key; source, place (row number, or byte offset of the line for JSONL), window and
sample (index of the generated response; -1 without generation); disposition; reason (quarantined
rows only); columns (the kept source columns as JSON)."""

_ACCOUNTS = b"tutelage.accounts"
_SHOWN_ROWS = 5


class Accounts(StrictModel):
    """Dispositions of a run's rows. Each row read is in exactly one of the four counts.

    Attributes:
        rows_labelled: rows labelled by this run.
        rows_reused: rows labelled before the run.
        rows_duplicate: rows that repeat a request from earlier in the corpus.
        rows_quarantined: rows that could not be labelled.
        tokens: tokens in the rows that this run labelled.
        labels: labelled positions in those rows.
        reasons: number of quarantined rows by reason.
    """

    rows_read: int
    rows_labelled: int
    rows_reused: int
    rows_duplicate: int
    rows_quarantined: int
    tokens: int
    labels: int
    reasons: dict[str, int]

    def check(self) -> None:
        """Checks that the counts add up.

        Raises:
            AccountsError: they do not.
        """
        parts = (self.rows_labelled, self.rows_reused, self.rows_duplicate, self.rows_quarantined)
        if self.rows_read != sum(parts):
            raise AccountsError(
                f"{self.rows_read} rows read, but {parts[0]} labelled + {parts[1]} reused + "
                f"{parts[2]} duplicate + {parts[3]} quarantined = {sum(parts)}"
            )
        if sum(self.reasons.values()) != self.rows_quarantined:
            raise AccountsError(
                f"{self.rows_quarantined} rows quarantined, but the reasons {self.reasons} sum to "
                f"{sum(self.reasons.values())}"
            )


def write_part(store: Store, run: str, part: pa.Table) -> str:
    """Writes the rows that one task read. Idempotent: a retried task overwrites its own part.

    Args:
        store: the label set's store.
        run: identity of the run, valid as a file name.
        part: row_key and the place columns, and `columns` if source columns are kept. The other
            columns of ROSTER are filled in at the end of the run.

    Returns:
        Path of the part in the label set.
    """
    missing = [name for name in ("row_key", *PLACE_COLUMNS) if name not in part.column_names]
    if missing:
        raise RecordError(f"a roster part lacks {', '.join(missing)}")
    blank = pa.array([""] * len(part), pa.string())
    columns = {
        field.name: part.column(field.name) if field.name in part.column_names else blank
        for field in ROSTER
    }
    columns["row_key"] = columns["row_key"].cast(KEY_TYPE)
    table = pa.table({name: columns[name] for name in ROSTER.names}).cast(ROSTER)
    rel = f"{_parts_folder(run)}/{_hash_of_places(table)}.parquet"
    store.write_bytes(rel, table_bytes(table))
    return rel


def remove_parts(store: Store, run: str) -> None:
    """Deletes the parts of a run that ended before its roster was closed."""
    store.delete(_parts_folder(run))


def close_roster(label_set: LabelSet, run: str, frozen_keys: SortedKeys | None = None) -> Accounts:
    """Merges the parts of a run into its roster and accounts for every row. Idempotent.

    The first row of each key, by source, place, window and sample, is reused if `frozen_keys`
    contains the key, else labelled if a committed unit has it, else quarantined. Further rows with
    the same key are duplicates.

    Args:
        label_set: the label set that the run writes to.
        run: identity of the run.
        frozen_keys: sorted S16: `LabelSet.committed_keys` at the start of the run.

    Raises:
        AccountsError: a row is neither labelled nor quarantined, or two rows from the same place
            differ; the message names the rows.
        DamagedError: a part or a unit is damaged.
    """
    store, rel = label_set.store, roster_path(run)
    if not store.exists(rel):
        table = _merged_parts(store, run)
        frozen = np.empty(0, f"S{KEY_BYTES}") if frozen_keys is None else frozen_keys
        table, accounts = _account(table, label_set, frozen)
        accounts.check()
        metadata = {_ACCOUNTS: accounts.model_dump_json().encode()}
        fault_point("before_roster")
        store.write_bytes(rel, table_bytes(table.replace_schema_metadata(metadata)))
    fault_point("after_roster")
    # Rosters are written atomically, so parts beside one were left by a run killed right here.
    store.delete(_parts_folder(run))
    return read_accounts(label_set, run)


def finished_runs(label_set: LabelSet) -> list[str]:
    """Names of the runs with a closed roster, sorted, which is oldest first."""
    rosters = label_set.store.list("rosters", ".parquet")
    return [rel.rsplit("/", 1)[-1].removesuffix(".parquet") for rel in rosters]


def read_roster(label_set: LabelSet, run: str) -> pa.Table:
    """Reads the closed roster of a run, ordered by source, place, window and sample.

    Raises:
        StoreError: it does not exist.
        DamagedError: it is damaged.
    """
    rel = roster_path(run)
    if not label_set.store.exists(rel):
        raise MissingError(f"{label_set.store.path(rel)}: no roster of a finished run {run!r}")
    return _read(label_set.store, rel)


def read_accounts(label_set: LabelSet, run: str) -> Accounts:
    """Reads the accounts in a closed roster; raises the errors of `read_roster`."""
    metadata = read_roster(label_set, run).schema.metadata or {}
    if _ACCOUNTS not in metadata:
        raise DamagedError(f"{label_set.store.path(roster_path(run))}: contains no accounts")
    return Accounts.model_validate_json(metadata[_ACCOUNTS])


def roster_path(run: str) -> str:
    """Path of a run's roster in its label set."""
    return f"rosters/{run}.parquet"


def _parts_folder(run: str) -> str:
    return f"rosters/{run}.parts"


def _hash_of_places(table: pa.Table) -> str:
    places = json.dumps([table.column(name).to_pylist() for name in PLACE_COLUMNS])
    return digest("roster part", places.encode()).hex()


def _merged_parts(store: Store, run: str) -> pa.Table:
    parts = [_read(store, rel) for rel in store.list(_parts_folder(run), ".parquet")]
    table = pa.concat_tables([ROSTER.empty_table(), *parts]).combine_chunks()
    table = table.sort_by([(name, "ascending") for name in PLACE_COLUMNS]).combine_chunks()
    if len(table) < 2:
        return table
    # After a fault, the corpus may be split differently, so two tasks may have read the same place.
    again = np.ones(len(table) - 1, bool)
    for name in PLACE_COLUMNS:
        column = table.column(name)
        again &= np.asarray(pc.equal(column[1:], column[:-1]).to_numpy(), bool)
    keys = as_strings(key_array(table, "row_key"))
    _reject(
        table,
        np.append(False, again & (keys[1:] != keys[:-1])),
        "was read twice with different content; the corpus changed during the run",
    )
    return table.filter(pa.array(np.append(True, ~again)))


def _account(table: pa.Table, label_set: LabelSet, frozen: SortedKeys) -> tuple[pa.Table, Accounts]:
    keys = key_array(table, "row_key")
    index, quarantine = label_set.index(), label_set.quarantine()
    first = first_occurrences(keys)
    reused = first & contains(frozen, keys)
    found = find_keys(key_array(index, "row_key"), keys)
    labelled = first & ~reused & (found >= 0)
    reason_at = find_keys(key_array(quarantine, "row_key"), keys)
    quarantined = first & ~reused & ~labelled & (reason_at >= 0)
    lost = first & ~reused & ~labelled & ~quarantined
    _reject(table, lost, "is neither labelled nor quarantined; run the job again")
    _reject(table, reused & (found < 0), "had labels when the run started but has none now")

    dispositions = np.select(
        [labelled, reused, quarantined], [LABELLED, REUSED, QUARANTINED], DUPLICATE
    )
    reasons = np.full(len(table), "", object)
    reasons[quarantined] = _column(quarantine, "reason")[reason_at[quarantined]]
    table = _with_column(table, "disposition", dispositions.tolist())
    table = _with_column(table, "reason", reasons.tolist())
    names, counts = np.unique(reasons[quarantined].astype(str), return_counts=True)
    accounts = Accounts(
        rows_read=len(table),
        rows_labelled=int(labelled.sum()),
        rows_reused=int(reused.sum()),
        rows_duplicate=int((~first).sum()),
        rows_quarantined=int(quarantined.sum()),
        tokens=int(_column(index, "num_tokens")[found[labelled]].sum()),
        labels=int(_column(index, "num_labels")[found[labelled]].sum()),
        reasons={str(name): int(count) for name, count in zip(names, counts, strict=True)},
    )
    return table, accounts


def _reject(table: pa.Table, bad: Bools, problem: str) -> None:
    if not bad.any():
        return
    shown = table.filter(pa.array(bad)).slice(0, _SHOWN_ROWS).select(PLACE_COLUMNS).to_pylist()
    rows = ", ".join(
        f"{row['source']} place {row['place']} window {row['window']}"
        + (f" sample {row['sample']}" if row["sample"] >= 0 else "")
        for row in shown
    )
    more = f" and {int(bad.sum()) - len(shown)} more" if bad.sum() > len(shown) else ""
    raise AccountsError(f"{int(bad.sum())} of {len(table)} rows: {rows}{more}: each {problem}")


def _read(store: Store, rel: str) -> pa.Table:
    try:
        return parse_table(store.read_bytes(rel), ROSTER)
    except DamagedError as error:
        raise DamagedError(f"{store.path(rel)}: {error}; run the job again") from error


def _with_column(table: pa.Table, name: str, values: list[str]) -> pa.Table:
    column = ROSTER.get_field_index(name)
    return table.set_column(column, ROSTER.field(name), pa.array(values, pa.string()))


def _column(table: pa.Table, name: str) -> npt.NDArray[Any]:
    return table.column(name).to_numpy()
