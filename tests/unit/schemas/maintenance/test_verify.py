"""`labels verify`: every damage is found and placed, and dropping the unit mends it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.__main__ import main
from schemas.errors import StoreError
from schemas.keys import unit_key
from schemas.label_set import shards
from schemas.label_set.label_set import LabelSet, QuarantineRow
from schemas.label_set.manifest import Manifest
from schemas.label_set.shards import FINGERPRINT_KEY
from schemas.label_set.tables import KEYS, read_table
from schemas.maintenance.verify import Verified, verify
from schemas.record import LabelRows
from schemas.record.columns import arrow_schema
from schemas.spec import RecordSpec
from schemas.storage.store import Store
from tests.support.label_rows import make_rows, make_spec

VOCAB = 60
SPEC = make_spec(RecordSpec(kind="threshold", tau=0.05, temperatures=(2.0,)), VOCAB)
LEAVES = SPEC.record.columns


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 3000)


@pytest.fixture
def label_set(tmp_path: Path) -> LabelSet:
    label_set = LabelSet.create_or_open(str(tmp_path / "labels"), SPEC, {"a": 0})
    commit(label_set, rows_of(1))
    return label_set


def rows_of(seed: int) -> LabelRows:
    return make_rows(20, SPEC.record, VOCAB, seed=seed)


def commit(label_set: LabelSet, rows: LabelRows) -> Manifest:
    bad = [QuarantineRow(bytes([9] * 15 + [seed_of(rows)]), "a.jsonl", 3, 0, "bad_json", "{")]
    return label_set.commit_unit(rows, bad, {}, unit_key(rows.row_key))


def seed_of(rows: LabelRows) -> int:
    return int(rows.row_key[0, 0])


def path_of(label_set: LabelSet, rel: str) -> Path:
    return Path(label_set.store.path(rel))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(bytes(data))


def mend(label_set: LabelSet, unit: str, rows: LabelRows) -> None:
    """What every repair says: drop the unit, and label again."""
    assert main(["labels", "drop", label_set.url, "--unit", unit]) == 0
    commit(label_set, rows)
    assert verify(label_set.url).problems == []


def test_verify_passes_an_intact_set(
    label_set: LabelSet, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = commit(label_set, rows_of(2))
    assert len(manifest.row_groups) > 2
    result = verify(label_set.url)
    assert result.problems == []
    assert (result.units, result.rows, result.quarantined) == (2, 40, 2)
    assert result.labels == sum(m.num_labels for m in label_set.manifests())
    assert main(["labels", "verify", label_set.url]) == 0
    assert "OK: checked 2 units, 40 rows" in capsys.readouterr().out


@pytest.mark.parametrize("column", LEAVES)
def test_verify_finds_a_flipped_byte_in_any_column(label_set: LabelSet, column: str) -> None:
    rows = rows_of(2)
    manifest = commit(label_set, rows)
    path = path_of(label_set, manifest.shard)
    meta = pq.ParquetFile(path).metadata.row_group(1)
    chunk = meta.column(LEAVES.index(column))
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    flip(path, start + chunk.total_compressed_size - 1)
    result = verify(label_set.url)
    places = {(p.what, p.file, p.unit_key, p.row_group, p.column) for p in result.problems}
    assert places == {
        ("bytes", manifest.shard, manifest.unit_key, None, ""),
        ("pages", manifest.shard, manifest.unit_key, 1, column),
    }
    assert all(f"--unit {manifest.unit_key}" in p.repair for p in result.problems)
    mend(label_set, manifest.unit_key, rows)


def test_verify_finds_any_flipped_byte_of_a_shard(label_set: LabelSet) -> None:
    rows = rows_of(2)
    manifest = commit(label_set, rows)
    path = path_of(label_set, manifest.shard)
    whole = path.read_bytes()
    rng = np.random.default_rng(5)
    for at in [0, len(whole) - 1, *rng.integers(0, len(whole), 60)]:
        flip(path, int(at))
        assert verify(label_set.url).units_to_drop == [manifest.unit_key], at
        path.write_bytes(whole)
    assert verify(label_set.url).problems == []


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def foreign(path: Path) -> None:
    content = json.loads(path.read_bytes())
    path.write_text(json.dumps(content | {"fingerprint": "0" * 32}))


def other_unit(path: Path) -> None:
    content = json.loads(path.read_bytes())
    path.write_text(json.dumps(content | {"unit_key": "0" * 32}))


FILES: dict[str, tuple[str, Callable[[Path], None], str, str]] = {
    "truncated shard": ("shard", truncate, "bytes", "bytes, the manifest records"),
    "missing shard": ("shard", Path.unlink, "missing", "no such shard"),
    "missing keys": ("keys", Path.unlink, "missing", "no such file"),
    "damaged keys": ("keys", lambda path: flip(path, 60), "keys", ""),
    "missing quarantine": ("quarantine", Path.unlink, "missing", "no such file"),
    "damaged quarantine": ("quarantine", truncate, "quarantine", "cannot be read"),
    "torn manifest": ("manifest", truncate, "manifest", "not a valid manifest"),
    "foreign manifest": ("manifest", foreign, "manifest", "belongs to a label set with"),
    "manifest of another unit": ("manifest", other_unit, "manifest", "is the manifest of unit"),
}


@pytest.mark.parametrize("name", FILES)
def test_verify_finds_damaged_files(
    label_set: LabelSet, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    field, damage, what, found = FILES[name]
    rows = rows_of(2)
    manifest = commit(label_set, rows)
    rel = f"manifests/{manifest.unit_key}.json"
    damage(path_of(label_set, rel if field == "manifest" else getattr(manifest, field)))
    result = verify(label_set.url)
    assert result.units_to_drop == [manifest.unit_key]
    assert what in {problem.what for problem in result.problems}
    assert found in " ".join(problem.found for problem in result.problems)
    assert main(["labels", "verify", label_set.url]) == 1
    shown = capsys.readouterr().out
    assert f"labels drop {label_set.url} --unit {manifest.unit_key}" in shown
    assert "in 1 of 2 units" in shown
    mend(label_set, manifest.unit_key, rows)


def forge(label_set: LabelSet, rows: LabelRows, changed: LabelRows) -> Manifest:
    """Commits `rows`, then writes `changed` in their place past every check, the digest fitting."""
    manifest = commit(label_set, rows)
    path = path_of(label_set, manifest.shard)
    schema = arrow_schema(SPEC.record)
    schema = schema.with_metadata(
        {**schema.metadata, FINGERPRINT_KEY: label_set.fingerprint.encode()}
    )
    first = 0
    with pq.ParquetWriter(path, schema, write_page_checksum=True) as writer:
        for size in manifest.row_groups:
            group = changed.slice(first, first + size).to_table(SPEC.record)
            writer.write_table(group, row_group_size=size)
            first += size
    data = path.read_bytes()
    forged = manifest.model_copy(
        update={"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    )
    path_of(label_set, f"manifests/{manifest.unit_key}.json").write_text(forged.model_dump_json())
    return forged


def unordered(rows: LabelRows, row: int) -> int:
    """Turns a head around; returns its position in the row."""
    assert rows.entry_logprobs is not None
    assert rows.entry_offsets is not None
    assert rows.head_len is not None
    first, last = rows.label_offsets[row : row + 2]
    at = int(first + np.argmax(rows.head_len[first:last]))
    head = slice(rows.entry_offsets[at], rows.entry_offsets[at] + rows.head_len[at])
    rows.entry_logprobs[head] = rows.entry_logprobs[head][::-1]
    return at - int(first)


def too_probable(rows: LabelRows, row: int) -> int:
    """A tail as probable as everything, at the row's first label; returns its position."""
    assert rows.tail_logmass is not None
    rows.tail_logmass[rows.label_offsets[row]] = np.float16(-0.01)
    return 0


BREAKS = {
    "a decreasing order": (unordered, "entry_logprobs"),
    "sum to a probability of 1": (too_probable, "entry_logprobs"),
}


@pytest.mark.parametrize("found", BREAKS)
def test_verify_names_rows_that_break_an_invariant(label_set: LabelSet, found: str) -> None:
    change, column = BREAKS[found]
    rows = rows_of(2)
    changed = rows.take(np.arange(len(rows)))
    broken = [3, 11]
    positions = [change(changed, row) for row in broken]
    manifest = forge(label_set, rows, changed)
    result = verify(label_set.url)
    groups = np.repeat(np.arange(len(manifest.row_groups)), manifest.row_groups)
    starts = np.cumsum([0, *manifest.row_groups])
    expected = [
        (groups[row], row - starts[groups[row]], rows.row_key[row].tobytes().hex())
        for row in broken
    ]
    assert [(p.row_group, p.row, p.row_key) for p in result.problems] == expected
    for problem, position in zip(result.problems, positions, strict=True):
        assert found in problem.found
        assert f"position {position}, column {column}" in problem.found
        assert problem.file == manifest.shard
    mend(label_set, manifest.unit_key, rows)


def test_verify_finds_rows_that_differ_from_their_keys(label_set: LabelSet) -> None:
    rows = rows_of(2)
    changed = rows.take(np.arange(len(rows)))
    changed.token_ids[0] = (changed.token_ids[0] + 1) % VOCAB  # never a target: no label is wrong
    forge(label_set, rows, changed)
    problems = verify(label_set.url).problems
    assert {(p.row_group, p.row) for p in problems} == {(0, 0)}
    assert {p.found.split()[0] for p in problems} == {"row_key", "content_key"}


def test_verify_compares_key_files_with_shards(label_set: LabelSet) -> None:
    rows = rows_of(2)
    forge(label_set, rows, rows.take(np.arange(len(rows))[::-1]))
    problems = verify(label_set.url).problems
    assert {p.what for p in problems} == {"keys"}
    assert {"row_key", "num_tokens"} <= {p.column for p in problems}


def test_verify_lists_every_problem(label_set: LabelSet) -> None:
    kept, torn, gone = (commit(label_set, rows_of(seed)) for seed in (2, 3, 4))
    truncate(path_of(label_set, f"manifests/{torn.unit_key}.json"))
    path_of(label_set, gone.shard).unlink()
    vocabulary = next(Path(label_set.url).glob("vocabulary-*.json"))
    vocabulary.write_text("{}")
    path_of(label_set, "rosters").mkdir()
    path_of(label_set, "rosters/run.parquet").write_bytes(b"PAR1")
    result: Verified = verify(label_set.url)
    assert result.units_to_drop == sorted([torn.unit_key, gone.unit_key])
    assert kept.unit_key not in result.units_to_drop
    assert {p.what for p in result.problems} == {"bytes", "manifest", "missing", "roster"}
    assert result.garbage == 1


def test_verify_reports_a_broken_description(label_set: LabelSet, tmp_path: Path) -> None:
    truncate(path_of(label_set, "label_set.json"))
    out = tmp_path / "out.json"
    assert main(["labels", "verify", label_set.url, "--json", str(out)]) == 1
    (problem,) = json.loads(out.read_text())["problems"]
    assert (problem["what"], problem["file"]) == ("set", "label_set.json")
    assert main(["labels", "verify", str(tmp_path / "nothing")]) == 1


PLACES = {"open": Store, "read_row_group": pq.ParquetFile, "read_bytes": Store}


@pytest.mark.parametrize("method", PLACES)
@pytest.mark.parametrize("error", [PermissionError("Access Denied"), TimeoutError()])
def test_verify_takes_no_answer_for_no_damage(
    label_set: LabelSet,
    method: str,
    error: OSError,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Dropping a unit that is whole would cost its labels."""
    works = getattr(PLACES[method], method)

    def fail(self: Any, rel: Any, *args: Any, **kwargs: Any) -> Any:
        if method == "read_bytes" and not str(rel).startswith(("keys", "quarantine")):
            return works(self, rel, *args, **kwargs)
        if method == "read_bytes":
            raise StoreError("cannot be read") from error
        raise error

    monkeypatch.setattr(PLACES[method], method, fail)
    with pytest.raises(StoreError, match=r"cannot be read"):
        verify(label_set.url)
    assert main(["labels", "verify", label_set.url]) == 1
    told = capsys.readouterr()
    assert "error: " in told.err
    assert "drop" not in told.err + told.out


def test_verify_raises_where_tables_cannot_be_fetched(
    label_set: LabelSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Store, rel: str) -> bytes:
        raise StoreError(f"{rel}: busy; tried again for 900s")

    (manifest,) = label_set.manifests()
    monkeypatch.setattr(Store, "read_bytes", fail)
    with pytest.raises(StoreError, match=r"tried again for 900s$"):
        read_table(label_set.store, manifest.keys, KEYS, manifest.num_rows, manifest.unit_key)
