"""A label set: a folder of committed units of labels that share one spec.

```
label_set.json                    the spec and its fingerprint; created exclusively
vocabulary-<digest>.json          token -> id of the teacher's tokenizer
shards/<attempt>.parquet          data
keys/<unit>.<attempt>.parquet     row keys, lengths and places, so that shards stay unopened
quarantine/<unit>.<attempt>.parquet  rows that could not be labelled, with reasons
manifests/<unit>.json             the commit; created exclusively and last
```

File names contain the attempt, so that concurrent attempts at a unit never touch each other's
files; a manifest names the files of its own attempt. Files that no manifest names are garbage, left
by attempts that lost the race or died.
"""

import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.console.progress import ProgressCallback
from schemas.errors import RecordError, StoreError
from schemas.fault_points import fault_point
from schemas.keys import SortedKeys, contains, keys_to_sorted
from schemas.label_set.description import (
    LABEL_SET_FILE,
    LabelSetFile,
    read_label_set_file,
    read_vocabulary,
    write_vocabulary,
)
from schemas.label_set.manifest import (
    MANIFESTS,
    Fidelity,
    Manifest,
    manifest_path,
    read_manifest,
    write_manifest,
)
from schemas.label_set.shards import ShardInfo, read_row_group, write_shard
from schemas.label_set.tables import (
    INDEX,
    KEYS,
    QUARANTINE,
    QuarantineRow,
    first_of_each_key,
    key_array,
    quarantine_table,
    read_table,
    table_bytes,
    unit_keys_table,
)
from schemas.record.columns import arrow_schema
from schemas.record.reduce import label_set_conflicts
from schemas.record.rows import LabelRows
from schemas.spec import LabelSetSpec
from schemas.storage.retry import retry
from schemas.storage.store import Store

__all__ = ["LabelSet", "QuarantineRow"]

S = TypeVar("S")
T = TypeVar("T")

READERS = 16
"""Concurrent reads of small files; object stores have high latency but serve many at once."""

_UNIT_KEY = re.compile(r"[0-9A-Za-z_-]+")


class LabelSet:
    """An existing label set; see `create_or_open` and `open`.

    Attributes:
        url: where the label set is.
        store: access to its files.
        spec: what its labels mean.
        fingerprint: fingerprint of `spec`.
        vocabulary_file: path of the vocabulary in the set; empty if the set has none.
    """

    def __init__(self, store: Store, file: LabelSetFile) -> None:
        self.url = store.url
        self.store = store
        self.spec = file.spec
        self.fingerprint = file.fingerprint
        self.vocabulary_file = file.vocabulary

    @staticmethod
    def create_or_open(
        url: str, spec: LabelSetSpec, vocabulary: Mapping[str, int] | None = None
    ) -> "LabelSet":
        """Opens the label set at `url`, or creates it with this spec.

        An existing set with richer labels can serve the request too. It keeps its own `spec`, also
        for rows added later; readers reduce rows with `schemas.record.reduce`.

        Args:
            url: any writable fsspec URL.
            spec: the requested labels.
            vocabulary: token -> id of the teacher's tokenizer, which trainers compare with the
                student's; written only on creation.

        Raises:
            StoreError: the existing label set cannot serve this spec (the message lists the
                differences), or the store cannot write safely.
        """
        store = Store(url)
        if not store.exists(LABEL_SET_FILE):
            store.probe_exclusive()
            name = write_vocabulary(store, vocabulary) if vocabulary is not None else ""
            file = LabelSetFile(fingerprint=spec.fingerprint(), spec=spec, vocabulary=name)
            store.create_exclusive(LABEL_SET_FILE, (file.model_dump_json(indent=1)).encode())
        label_set = LabelSet.open(url)
        conflicts = label_set_conflicts(label_set.spec, spec)
        if conflicts:
            raise StoreError(
                f"{url}: holds labels of another spec (stored / requested): "
                f"{'; '.join(conflicts)}. Use another folder, or the configuration that created it"
            )
        return label_set

    @staticmethod
    def open(url: str) -> "LabelSet":
        """Opens the label set at `url`.

        Raises:
            StoreError: it does not exist, or was created by a later version of this project.
            DamagedError: its description is damaged or does not match its fingerprint.
        """
        store = Store(url)
        return LabelSet(store, read_label_set_file(store))

    def vocabulary(self) -> dict[str, int]:
        """Token -> id of the teacher's tokenizer.

        Raises:
            StoreError: the set was created without one.
            DamagedError: the file's content does not match its digest.
        """
        if not self.vocabulary_file:
            raise StoreError(f"{self.url}: this label set was created without a vocabulary")
        return read_vocabulary(self.store, self.vocabulary_file)

    # Committing

    def commit_unit(
        self,
        rows: LabelRows | None,
        quarantined: Sequence[QuarantineRow],
        provenance: Mapping[str, Any],
        unit_key: str,
        fidelity: Fidelity | None = None,
    ) -> Manifest:
        """Commits a unit of work, or returns its manifest if it is already committed.

        A process killed at any point leaves either a complete unit or files that no reader uses.

        Args:
            rows: labelled rows; None or empty for none.
            quarantined: rows that could not be labelled.
            provenance: plain JSON values.
            unit_key: identity of the unit: `keys.unit_key` of all row keys of the task's input,
                quarantined rows included.
            fidelity: result of an audit of the labels.

        Returns:
            The manifest of the winning attempt, which may be another one.

        Raises:
            RecordError: a row violates an invariant, or two rows have the same key.
            StoreError: the store cannot be written.
        """
        if not _UNIT_KEY.fullmatch(unit_key):
            raise RecordError(f"unit key {unit_key!r}: expected letters, digits, _ and - only")
        if rows is not None and not len(rows):
            rows = None
        if self.store.exists(manifest_path(unit_key)):
            return read_manifest(self.store, manifest_path(unit_key), self.fingerprint)
        _check_keys(rows, quarantined, unit_key)
        attempt = uuid.uuid4().hex
        shard, keys, quarantine = ShardInfo(), "", ""
        if rows is not None:
            shard = self._write_shard(f"shards/{attempt}.parquet", rows)
            keys = f"keys/{unit_key}.{attempt}.parquet"
            self.store.write_bytes(keys, table_bytes(unit_keys_table(rows, shard.row_groups)))
        if quarantined:
            quarantine = f"quarantine/{unit_key}.{attempt}.parquet"
            self.store.write_bytes(quarantine, table_bytes(quarantine_table(quarantined)))
        manifest = Manifest(
            **shard.model_dump(),
            unit_key=unit_key,
            attempt=attempt,
            fingerprint=self.fingerprint,
            keys=keys,
            quarantine=quarantine,
            num_quarantined=len(quarantined),
            fidelity=fidelity,
            provenance=dict(provenance),
        )
        fault_point("before_manifest")
        winner = write_manifest(self.store, manifest)
        fault_point("before_report")
        return winner

    def _write_shard(self, rel: str, rows: LabelRows) -> ShardInfo:
        record, vocab_size = self.spec.record, self.spec.teacher.vocab_size
        return retry(
            lambda: write_shard(self.store, rel, rows, record, self.fingerprint, vocab_size),
            self.store.path(rel),
        )

    # Reading committed units without opening a shard

    def manifests(self) -> list[Manifest]:
        """The manifests of all committed units, by unit key.

        Raises:
            DamagedError: a manifest is damaged or belongs to another label set; the message names
                the file and the repair.
        """
        names = self.store.list(MANIFESTS, ".json")
        return _read_all(lambda rel: read_manifest(self.store, rel, self.fingerprint), names)

    def committed_keys(self) -> SortedKeys:
        """Sorted S16: the keys of all labelled rows, for `keys.contains`."""
        return keys_to_sorted(key_array(self.index(), "row_key"))

    def quarantined_keys(self) -> SortedKeys:
        """Sorted S16: the keys of quarantined rows that have not been labelled since."""
        return keys_to_sorted(key_array(self.quarantine(), "row_key"))

    def index(self, progress: ProgressCallback | None = None) -> pa.Table:
        """Locates every labelled row; one in several units is listed for the smallest unit key.

        Args:
            progress: called with the number of units read so far, and of all units.

        Returns:
            Columns row_key, unit_key, shard, row_group, row (in its row group), num_tokens,
            num_labels; sorted by unit key, row group and row.

        Raises:
            DamagedError: a unit's key file does not match its manifest.
        """
        units = [manifest for manifest in self.manifests() if manifest.keys]
        tables = _read_all(self._unit_index, units, progress)
        table = pa.concat_tables([INDEX.empty_table(), *tables]).unify_dictionaries()
        return first_of_each_key(table)

    def quarantine(self) -> pa.Table:
        """The rows that have not been labelled so far, each row key once.

        Returns:
            Columns row_key, source, place, window, reason, detail.

        Raises:
            DamagedError: a unit's quarantine file does not match its manifest.
        """
        units = [manifest for manifest in self.manifests() if manifest.quarantine]
        tables = _read_all(self._unit_quarantine, units)
        table = first_of_each_key(pa.concat_tables([QUARANTINE.empty_table(), *tables]))
        if not len(table):
            return table
        labelled = contains(self.committed_keys(), key_array(table, "row_key"))
        return table.filter(pa.array(~labelled))

    def _unit_index(self, manifest: Manifest) -> pa.Table:
        keys = read_table(self.store, manifest.keys, KEYS, manifest.num_rows, manifest.unit_key)
        columns = {name: keys.column(name) for name in keys.column_names}
        codes = pa.array(np.zeros(len(keys), np.int32))
        for name in ("unit_key", "shard"):
            columns[name] = pa.DictionaryArray.from_arrays(codes, [getattr(manifest, name)])
        return pa.table(columns, schema=INDEX)

    def _unit_quarantine(self, manifest: Manifest) -> pa.Table:
        rel, num_rows = manifest.quarantine, manifest.num_quarantined
        return read_table(self.store, rel, QUARANTINE, num_rows, manifest.unit_key)

    def drop_unit(self, unit_key: str) -> None:
        """Removes a unit, so that the next job labels its rows again.

        Deletes only the manifest, which may be damaged; the files it names become garbage.

        Raises:
            StoreError: the unit does not exist.
        """
        rel = manifest_path(unit_key)
        if not _UNIT_KEY.fullmatch(unit_key) or not self.store.exists(rel):
            raise StoreError(
                f"{self.url}: no unit {unit_key}; units are named by the files in "
                f"{self.store.path('manifests')}, without .json"
            )
        self.store.delete(rel)

    # Reading labels

    def read_rows(self, where: pa.Table, columns: Sequence[str] | None = None) -> LabelRows:
        """Reads the rows at the given places, in that order; reads each row group once.

        Args:
            where: columns shard, row_group and row, for example rows of `index`.
            columns: label columns to read; None: all.

        Raises:
            DamagedError: a shard is damaged.
            StoreError: a shard is missing.
        """
        spec = self.spec.record
        if not len(where):
            return LabelRows.from_table(arrow_schema(spec).empty_table(), spec)
        places = pa.table(
            {
                "shard": pc.cast(where.column("shard"), pa.string()),
                "row_group": where.column("row_group"),
                "row": where.column("row"),
                "order": pa.array(range(len(where)), pa.int64()),
            }
        )
        parts, order = [], []
        grouped = places.group_by(["shard", "row_group"], use_threads=False)
        for group in grouped.aggregate([("row", "list"), ("order", "list")]).to_pylist():
            rows = read_row_group(self.store, group["shard"], group["row_group"], spec, columns)
            parts.append(rows.take(np.array(group["row_list"])))
            order.extend(group["order_list"])
        back = pc.sort_indices(pa.array(order)).to_numpy()
        return LabelRows.concat(parts).take(back)


def _read_all(
    read: Callable[[S], T],
    items: Sequence[S],
    progress: ProgressCallback | None = None,
) -> list[T]:
    """Reads many small files concurrently; results keep the order of the items."""
    found = []
    with ThreadPoolExecutor(READERS) as pool:
        for result in map(read, items) if len(items) < 2 else pool.map(read, items):
            found.append(result)
            if progress is not None:
                progress(len(found), len(items))
    return found


def _check_keys(
    rows: LabelRows | None, quarantined: Sequence[QuarantineRow], unit_key: str
) -> None:
    keys = [row.row_key for row in quarantined]
    if rows is not None:
        keys.extend(key.tobytes() for key in rows.row_key)
    if not keys:
        raise RecordError(f"unit {unit_key}: neither labelled nor quarantined rows to commit")
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RecordError(f"unit {unit_key}: row key {twice.hex()} occurs more than once")
