"""Views: rows of label sets selected for training, with their lengths and places.

A trainer plans its epochs from a view without opening a shard. A view pins shards, so that a
dropped or damaged unit is an error instead of silently less training data.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pydantic
from pydantic import Field

from schemas.config import StrictModel
from schemas.console.text import count_text
from schemas.errors import DamagedError, MissingError, StoreError
from schemas.keys import find_keys
from schemas.label_set.label_set import LabelSet
from schemas.label_set.manifest import repair
from schemas.label_set.roster import LABELLED, REUSED, Accounts, read_accounts, read_roster
from schemas.label_set.tables import (
    NAMES,
    first_of_each_key,
    key_array,
    parse_table,
    required_fields,
    table_bytes,
)
from schemas.record.key_columns import KEY_TYPE
from schemas.record.reduce import record_conflicts
from schemas.spec import LabelSetSpec, RecordSpec
from schemas.storage.store import Store

VIEW_ROWS = "view.parquet"
VIEW_FILE = "view.json"

VIEW = pa.schema(
    required_fields(
        row_key=KEY_TYPE,
        label_set=pa.int16(),
        shard=NAMES,
        row_group=pa.int32(),
        row=pa.int32(),
        num_tokens=pa.int32(),
        num_labels=pa.int32(),
        source=pa.string(),
        weight=pa.float32(),
    )
)
"""Columns: row_key; label_set, index into the view's list; shard, row_group and row in it; lengths;
source; weight, a factor on the row's loss. Sorted by label set, unit, row group and row, so that
rows of a shard are contiguous and relabelling the same units gives the same order."""


class PinnedShard(StrictModel):
    """A shard that contains rows of a view."""

    shard: str
    unit_key: str
    size_bytes: int


class ViewSource(StrictModel):
    """A label set of a view, and the run whose rows were selected.

    Attributes:
        url: URL of the label set; relative to the view if both are local, so that they can be moved
            together.
        record: record that readers of the view reduce rows to; None: the label set's.
    """

    url: str
    fingerprint: str
    spec: LabelSetSpec
    run: str
    accounts: Accounts
    shards: list[PinnedShard]
    record: RecordSpec | None = None


class ViewFile(StrictModel):
    """Content of view.json, which is written last.

    Attributes:
        selection: how rows were selected; empty: all rows of the runs.
    """

    view_hash: str
    num_rows: int
    num_tokens: int
    num_labels: int
    sources: list[ViewSource]
    selection: dict[str, Any] = Field(default_factory=dict)


class View:
    """An existing view; see `build_view` and `View.open`.

    Attributes:
        url: where the view is.
        view_hash: hash of the fingerprints and of the ordered rows and weights.
        table: the rows, in the schema VIEW.
        label_sets: label sets, indexed by the column `label_set`.
        sources: descriptions of the label sets in view.json.
        records: record that readers get from each label set; see `schemas.record.reduce`.
    """

    def __init__(self, url: str, file: ViewFile, table: pa.Table) -> None:
        self.url = url
        self.view_hash = file.view_hash
        self.table = table
        self.sources = file.sources
        self.records = [source.record or source.spec.record for source in file.sources]
        self.num_rows = file.num_rows
        self.num_tokens = file.num_tokens
        self.num_labels = file.num_labels
        self.label_sets = [_open_label_set(url, source) for source in file.sources]

    @staticmethod
    def open(url: str) -> "View":
        """Opens the view at `url`.

        Raises:
            StoreError: the view or one of its label sets does not exist.
            DamagedError: the view's files are damaged or do not match each other.
        """
        store = Store(url)
        if not store.exists(VIEW_FILE):
            raise StoreError(f"{url}: no view there (no {VIEW_FILE}); check the path, or label")
        try:
            file = ViewFile.model_validate_json(store.read_bytes(VIEW_FILE))
        except pydantic.ValidationError as error:
            what = str(error).replace("\n", " ")
            raise DamagedError(f"{store.path(VIEW_FILE)}: not a valid view ({what})") from error
        try:
            table = parse_table(store.read_bytes(VIEW_ROWS), VIEW)
        except (MissingError, DamagedError) as error:
            raise DamagedError(f"{store.path(VIEW_ROWS)}: {error}; rebuild the view") from error
        found = _view_hash(file.sources, table)
        if found != file.view_hash:
            raise DamagedError(
                f"{store.path(VIEW_ROWS)}: has hash {found}, but {VIEW_FILE} records "
                f"{file.view_hash}; rebuild the view"
            )
        return View(url, file, table)

    def __str__(self) -> str:
        """Describes location and size on one line."""
        counts = ", ".join(
            count_text(count, noun)
            for count, noun in (
                (self.num_rows, "row"),
                (self.num_tokens, "token"),
                (self.num_labels, "label"),
            )
        )
        return f"{self.url}: {counts} (view {self.view_hash})"

    def check_shards(self) -> None:
        """Checks that every pinned shard exists and has its recorded size.

        Raises:
            StoreError: a shard is missing because its unit was dropped; the message names both.
            DamagedError: a shard has another size; the message names shard, unit and repair.
        """
        for source, label_set in zip(self.sources, self.label_sets, strict=True):
            for pinned in source.shards:
                _check_shard(self.url, label_set, pinned)


def build_view(
    url: str, label_sets: Sequence[tuple[LabelSet, str]], record: RecordSpec | None = None
) -> View:
    """Builds a view of all rows that runs labelled or reused.

    A row that occurs in several runs is taken from the first.

    Args:
        url: where to write the view; an existing view is replaced.
        label_sets: label sets, each with the finished run to take rows from.
        record: record that readers reduce rows to; None: each label set's own.

    Raises:
        StoreError: a run has no closed roster; a row of a run is no longer in the label set; or a
            label set cannot be reduced to `record`.
    """
    indices = [label_set.index() for label_set, _ in label_sets]
    parts = [
        labelled_rows(number, label_set, run, read_roster(label_set, run), index)
        for number, ((label_set, run), index) in enumerate(zip(label_sets, indices, strict=True))
    ]
    table = first_of_each_key(
        pa.concat_tables([VIEW.empty_table(), *parts]).unify_dictionaries().combine_chunks()
    )
    return write_view(url, label_sets, table, record)


def write_view(
    url: str,
    label_sets: Sequence[tuple[LabelSet, str]],
    table: pa.Table,
    record: RecordSpec | None = None,
    selection: Mapping[str, Any] | None = None,
) -> View:
    """Writes a view of selected rows; an existing view is replaced.

    Args:
        url: where to write the view.
        label_sets: label sets, each with the finished run that its rows come from.
        table: the rows, in the schema and order of VIEW.
        record: record that readers reduce rows to; None: each label set's own.
        selection: how rows were selected, as plain JSON values.

    Raises:
        StoreError: a label set cannot be reduced to `record`.
    """
    store = Store(url)
    sources = [
        ViewSource(
            url=_relative_url(store, label_set.store),
            fingerprint=label_set.fingerprint,
            spec=label_set.spec,
            run=run,
            accounts=read_accounts(label_set, run),
            shards=_pinned(label_set, table.filter(pc.field("label_set") == number)),
            record=_reduced_record(label_set, record),
        )
        for number, (label_set, run) in enumerate(label_sets)
    ]
    file = ViewFile(
        view_hash=_view_hash(sources, table),
        num_rows=len(table),
        num_tokens=pc.sum(table.column("num_tokens"), min_count=0).as_py(),
        num_labels=pc.sum(table.column("num_labels"), min_count=0).as_py(),
        sources=sources,
        selection=dict(selection or {}),
    )
    # Deleted first and written last, so that a crash never leaves a mix of the old and new view.
    store.delete(VIEW_FILE)
    store.write_bytes(VIEW_ROWS, table_bytes(table))
    store.write_bytes(VIEW_FILE, file.model_dump_json(indent=1).encode())
    return View.open(url)


def _reduced_record(label_set: LabelSet, record: RecordSpec | None) -> RecordSpec | None:
    """The record, or None if it equals the label set's."""
    if record is None or record.identity() == label_set.spec.record.identity():
        return None
    conflicts = record_conflicts(label_set.spec.record, record)
    if conflicts:
        raise StoreError(
            f"{label_set.url}: cannot be reduced to the record requested for the view "
            f"({'; '.join(conflicts)}); request a smaller record, or label again"
        )
    return record


def labelled_rows(
    number: int,
    label_set: LabelSet,
    run: str,
    roster: pa.Table,
    index: pa.Table,
    schema: pa.Schema = VIEW,
) -> pa.Table:
    """The labelled rows of a run, in the order of the label set's index.

    Args:
        number: value of the column `label_set`.
        label_set: the label set.
        run: name of the run, for messages.
        roster: roster of the run; may have additional columns.
        index: index of the label set.
        schema: schema of the result: VIEW, optionally with columns of the roster.

    Raises:
        StoreError: a row of the run is no longer in the label set.
    """
    chosen = roster.filter(pc.is_in(roster.column("disposition"), pa.array([LABELLED, REUSED])))
    places = find_keys(key_array(index, "row_key"), key_array(chosen, "row_key"))
    gone = int((places < 0).sum())
    if gone:
        raise StoreError(
            f"{label_set.url}: {gone} rows of run {run} have lost their labels, because units "
            "were dropped; label the corpus again"
        )
    order = np.argsort(places)
    rows, chosen = index.take(pa.array(places[order])), chosen.take(pa.array(order))
    columns = {name: chosen.column(name) for name in chosen.column_names}
    columns |= {name: rows.column(name) for name in rows.column_names}
    columns["label_set"] = pa.array(np.full(len(rows), number, np.int16))
    columns["weight"] = pa.array(np.ones(len(rows), np.float32))
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def _pinned(label_set: LabelSet, table: pa.Table) -> list[PinnedShard]:
    """The shards that contain rows of `table`, sorted by unit key."""
    wanted = set(pc.unique(pc.cast(table.column("shard"), pa.string())).to_pylist())
    return [
        PinnedShard(
            shard=manifest.shard, unit_key=manifest.unit_key, size_bytes=manifest.size_bytes
        )
        for manifest in label_set.manifests()
        if manifest.shard in wanted
    ]


def _view_hash(sources: Sequence[ViewSource], table: pa.Table) -> str:
    """32 hexadecimal digits; covers places, but not shard names, which are random."""
    hasher = hashlib.sha256()
    made_from: list[Any] = [source.fingerprint for source in sources]
    made_from += [source.record.identity() for source in sources if source.record is not None]
    hasher.update(json.dumps(made_from).encode())
    hasher.update(key_array(table, "row_key").tobytes())
    for name, kind in _HASHED.items():
        hasher.update(np.ascontiguousarray(table.column(name).to_numpy(), kind).tobytes())
    return hasher.hexdigest()[:32]


_HASHED = {
    "label_set": "<i2",
    "row_group": "<i4",
    "row": "<i4",
    "num_tokens": "<i4",
    "num_labels": "<i4",
    "weight": "<f4",
}


def _relative_url(view: Store, label_set: Store) -> str:
    if view.is_local and label_set.is_local:
        return os.path.relpath(label_set.root, view.root)
    return label_set.root if label_set.is_local else label_set.url


def _open_label_set(url: str, source: ViewSource) -> LabelSet:
    view = Store(url)
    is_relative = view.is_local and "://" not in source.url and not os.path.isabs(source.url)
    where = os.path.normpath(os.path.join(view.root, source.url)) if is_relative else source.url
    label_set = LabelSet.open(where)
    if label_set.fingerprint != source.fingerprint:
        raise StoreError(
            f"{url}: was built from a label set with fingerprint {source.fingerprint}, but "
            f"{where} has {label_set.fingerprint} now; rebuild the view"
        )
    return label_set


def _check_shard(url: str, label_set: LabelSet, pinned: PinnedShard) -> None:
    store, path = label_set.store, label_set.store.path(pinned.shard)
    if not store.exists(pinned.shard):
        raise StoreError(
            f"{path}: view {url} has rows of this shard, which no longer exists: unit "
            f"{pinned.unit_key} was dropped; label the corpus again and rebuild the view"
        )
    size = store.size(pinned.shard)
    if size != pinned.size_bytes:
        raise DamagedError(
            f"{path}: damaged, has {size} bytes but its manifest records {pinned.size_bytes}; unit "
            f"{pinned.unit_key}: {repair(store, pinned.unit_key)}"
        )
