"""A label set: a folder of committed units of labels, all of one spec.

```
label_set.json                    the spec and its fingerprint; created exclusively
vocabulary-<digest>.json          token -> id of the teacher's tokenizer
shards/<attempt>.parquet          data
keys/<unit>.<attempt>.parquet     row keys, lengths and places, so that opening a set reads no shard
quarantine/<unit>.<attempt>.parquet  rows that could not be labelled, each with its reason
manifests/<unit>.json             the commit; created exclusively and last
```

Everything but a manifest has the attempt in its name, so that two attempts at one unit never touch
each other's files, and a manifest names the files of its own attempt. What no manifest names is
garbage of an attempt that lost or died.
"""

import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

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
from schemas.label_set.shards import NO_SHARD, ShardInfo, read_row_group, write_shard
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
"""Small files that are read at the same time; object stores answer slowly but many at once."""

_UNIT_KEY = re.compile(r"[0-9A-Za-z_-]+")


class LabelSet:
    """A label set that exists. `create_or_open` or `open` make one.

    Attributes:
        url: where it is.
        store: its files.
        spec: what its labels mean.
        fingerprint: of the spec.
        vocabulary_file: where the vocabulary is in it; empty where it was made without.
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
        """The label set of this spec at `url`, made if nothing is there.

        One that holds more is used as well; its `spec` is its own, which added rows have too, and
        readers make what was asked for with `schemas.record.reduce`.

        Args:
            url: any fsspec URL that can be written to.
            spec: what the labels mean.
            vocabulary: token -> id of the teacher's tokenizer, for trainers to compare theirs with;
                kept on creation only.

        Raises:
            StoreError: a label set is there that cannot serve this one; says what differs. Or the
                store cannot be written to safely.
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
        """The label set at `url`.

        Raises:
            StoreError: none is there, or a later version of this project made it.
            DamagedError: its description is torn, or does not have its own fingerprint.
        """
        store = Store(url)
        return LabelSet(store, read_label_set_file(store))

    def vocabulary(self) -> dict[str, int]:
        """Token -> id of the teacher's tokenizer.

        Raises:
            StoreError: the set was made without.
            DamagedError: the file is not the one that was written.
        """
        if not self.vocabulary_file:
            raise StoreError(f"{self.url}: this label set was made without a vocabulary")
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
        """Commits one unit of work; if it is committed already, returns that manifest.

        Whatever this is killed between leaves either the whole unit or files that no reader trusts.

        Args:
            rows: the labelled rows; None or empty where there are none.
            quarantined: the rows that could not be labelled.
            provenance: plain JSON values.
            unit_key: identity of the unit, by `keys.unit_key` over all row keys of the task's
                input, quarantined ones included.
            fidelity: what an audit of the labels found.

        Returns:
            The manifest of the attempt that won, which may be another one.

        Raises:
            RecordError: the rows break an invariant, or a row is there twice.
            StoreError: the store cannot be written to.
        """
        if not _UNIT_KEY.fullmatch(unit_key):
            raise RecordError(f"unit key {unit_key!r}: expected letters, digits, _ and - only")
        if rows is not None and not len(rows):
            rows = None
        if self.store.exists(manifest_path(unit_key)):
            return read_manifest(self.store, manifest_path(unit_key), self.fingerprint)
        _refuse_twice(rows, quarantined, unit_key)
        attempt = uuid.uuid4().hex
        shard = self._write_shard(rows, attempt)
        keys = self._write_keys(rows, shard, f"keys/{unit_key}.{attempt}.parquet")
        kept = self._write_quarantine(quarantined, f"quarantine/{unit_key}.{attempt}.parquet")
        manifest = Manifest(
            unit_key=unit_key,
            attempt=attempt,
            fingerprint=self.fingerprint,
            shard=shard.path,
            sha256=shard.sha256,
            size_bytes=shard.size_bytes,
            num_rows=shard.num_rows,
            num_tokens=shard.num_tokens,
            num_labels=shard.num_labels,
            row_groups=shard.row_groups,
            keys=keys,
            quarantine=kept,
            num_quarantined=len(quarantined),
            num_entries=shard.num_entries,
            fidelity=fidelity,
            provenance=dict(provenance),
        )
        fault_point("before_manifest")
        winner = write_manifest(self.store, manifest)
        fault_point("before_report")
        return winner

    def _write_shard(self, rows: LabelRows | None, attempt: str) -> ShardInfo:
        if rows is None:
            return NO_SHARD
        rel = f"shards/{attempt}.parquet"
        return retry(
            lambda: write_shard(
                self.store,
                rel,
                rows,
                self.spec.record,
                self.fingerprint,
                self.spec.teacher.vocab_size,
            ),
            self.store.path(rel),
        )

    def _write_keys(self, rows: LabelRows | None, shard: ShardInfo, rel: str) -> str:
        if rows is None:
            return ""
        self.store.write_bytes(rel, table_bytes(unit_keys_table(rows, shard.row_groups)))
        return rel

    def _write_quarantine(self, quarantined: Sequence[QuarantineRow], rel: str) -> str:
        if not quarantined:
            return ""
        self.store.write_bytes(rel, table_bytes(quarantine_table(quarantined)))
        return rel

    # Reading what is committed, without opening a shard

    def manifests(self) -> list[Manifest]:
        """The manifests of all committed units, by unit key.

        Raises:
            DamagedError: one is torn or of another label set; names the file and the repair.
        """
        names = self.store.list(MANIFESTS, ".json")
        return _each(lambda rel: read_manifest(self.store, rel, self.fingerprint), names)

    def committed_keys(self) -> SortedKeys:
        """S16, rising: the keys of all labelled rows, for `keys.contains`."""
        return keys_to_sorted(key_array(self.index(), "row_key"))

    def quarantined_keys(self) -> SortedKeys:
        """S16, rising: the keys of all rows in quarantine that have not been labelled since."""
        return keys_to_sorted(key_array(self.quarantine(), "row_key"))

    def index(self, progress: Callable[[int, int], None] | None = None) -> pa.Table:
        """Where every labelled row is, each row key once: the copy in the smallest unit key.

        Args:
            progress: called with the units read so far, and all units.

        Returns:
            Columns row_key, unit_key, shard, row_group, row (in its row group), num_tokens,
            num_labels; by unit key, row group and row.

        Raises:
            DamagedError: the keys of a unit are not what its manifest says.
        """
        units = [manifest for manifest in self.manifests() if manifest.keys]
        tables = _each(self._index_of, units, progress)
        table = pa.concat_tables([INDEX.empty_table(), *tables]).unify_dictionaries()
        return first_of_each_key(table)

    def quarantine(self) -> pa.Table:
        """The rows that could not be labelled and have not been since, each row key once.

        Returns:
            Columns row_key, source, place, window, reason, detail.

        Raises:
            DamagedError: the quarantine of a unit is not what its manifest says.
        """
        units = [manifest for manifest in self.manifests() if manifest.quarantine]
        tables = _each(self._quarantine_of, units)
        table = first_of_each_key(pa.concat_tables([QUARANTINE.empty_table(), *tables]))
        if not len(table):
            return table
        labelled = contains(self.committed_keys(), key_array(table, "row_key"))
        return table.filter(pa.array(~labelled))

    def _index_of(self, manifest: Manifest) -> pa.Table:
        keys = self._unit_table(manifest, manifest.keys, KEYS, manifest.num_rows)
        columns = {name: keys.column(name) for name in keys.column_names}
        codes = pa.array(np.zeros(len(keys), np.int32))
        for name in ("unit_key", "shard"):
            columns[name] = pa.DictionaryArray.from_arrays(codes, [getattr(manifest, name)])
        return pa.table(columns, schema=INDEX)

    def _quarantine_of(self, manifest: Manifest) -> pa.Table:
        return self._unit_table(manifest, manifest.quarantine, QUARANTINE, manifest.num_quarantined)

    def _unit_table(
        self, manifest: Manifest, rel: str, schema: pa.Schema, num_rows: int
    ) -> pa.Table:
        return read_table(self.store, rel, schema, num_rows, manifest.unit_key)

    def drop_unit(self, unit_key: str) -> None:
        """Takes a unit out of the set, so that the next job labels its rows again.

        Only the manifest goes, which no reader does without; it need not be whole. What it named is
        garbage from then on.

        Raises:
            StoreError: there is no such unit.
        """
        rel = manifest_path(unit_key)
        if not _UNIT_KEY.fullmatch(unit_key) or not self.store.exists(rel):
            raise StoreError(
                f"{self.url}: has no unit {unit_key}; units are the names of the files in "
                f"{self.store.path('manifests')}, without .json"
            )
        self.store.delete(rel)

    # Reading labels

    def read_rows(self, where: pa.Table, columns: Sequence[str] | None = None) -> LabelRows:
        """The rows at the given places, in the given order; each row group is read once.

        Args:
            where: columns shard, row_group and row, for example a part of `index`.
            columns: columns of labels to read; None: all.

        Raises:
            DamagedError: a shard is not what was written.
            StoreError: a shard is not there.
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


def _each(
    read: Callable[[S], T],
    items: Sequence[S],
    progress: Callable[[int, int], None] | None = None,
) -> list[T]:
    """Reads many small files concurrently; the results are in the order of the items."""
    found = []
    with ThreadPoolExecutor(READERS) as pool:
        for result in map(read, items) if len(items) < 2 else pool.map(read, items):
            found.append(result)
            if progress is not None:
                progress(len(found), len(items))
    return found


def _refuse_twice(
    rows: LabelRows | None, quarantined: Sequence[QuarantineRow], unit_key: str
) -> None:
    keys = [row.row_key for row in quarantined]
    if rows is not None:
        keys.extend(key.tobytes() for key in rows.row_key)
    if not keys:
        raise RecordError(f"unit {unit_key}: neither labelled nor quarantined rows to commit")
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RecordError(f"unit {unit_key}: row key {twice.hex()} is there more than once")
