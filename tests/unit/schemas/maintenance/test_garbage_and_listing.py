"""`labels gc` takes only what no manifest names and is old; `labels ls` finds every set."""

import os
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsspec
import pytest

from cluster.__main__ import main
from schemas.errors import ConfigError, DamagedError, StoreError
from schemas.keys import unit_key
from schemas.label_set.label_set import LabelSet, QuarantineRow
from schemas.label_set.manifest import Manifest
from schemas.maintenance.garbage import collect_garbage
from schemas.maintenance.listing import list_label_sets
from schemas.maintenance.verify import verify
from schemas.spec import RecordSpec
from tests.support.label_rows import make_rows, make_spec

VOCAB = 60
SPEC = make_spec(RecordSpec(kind="topk", k=8), VOCAB)


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "sets" / "labels")
    else:
        yield f"memory://{uuid.uuid4().hex}/labels"
        fsspec.filesystem("memory").store.clear()


def make_set(url: str) -> tuple[LabelSet, Manifest, Manifest]:
    label_set = LabelSet.create_or_open(url, SPEC, {"a": 0})
    bad = [QuarantineRow(bytes(16), "a.jsonl", 3, 0, "bad_json", "{")]
    manifests = []
    for seed in (1, 2):
        rows = make_rows(5, SPEC.record, VOCAB, seed=seed)
        manifests.append(label_set.commit_unit(rows, bad, {}, unit_key(rows.row_key)))
        bad = []
    return label_set, manifests[0], manifests[1]


def test_gc_takes_only_old_files_that_no_manifest_names(url: str) -> None:
    label_set, dropped, kept = make_set(url)
    label_set.drop_unit(dropped.unit_key)
    store = label_set.store
    for rel in ("attempts/run/key/a.json", "rosters/run.parts/x.parquet", "shards/.writing-1"):
        store.write_bytes(rel, b"12345")
    store.write_bytes("rosters/run.parquet", b"kept")
    store.write_bytes("vocabulary-0.json", b"{}")
    store.write_bytes("notes.txt", b"a user's own")
    expected = {
        dropped.shard, dropped.keys, dropped.quarantine, "attempts/run/key/a.json",
        "rosters/run.parts/x.parquet", "shards/.writing-1", "vocabulary-0.json",
    }  # fmt: skip
    young = collect_garbage(url, 1.0)
    assert (young.files, young.too_young) == ([], len(expected))

    later = datetime.now(UTC) + timedelta(hours=3)
    dry = collect_garbage(url, 1.0, now=later)
    assert {file.file for file in dry.files} == expected
    assert dry.size_bytes == sum(file.size_bytes for file in dry.files) > dropped.size_bytes
    assert all(2.9 < file.age_hours < 3.1 for file in dry.files)
    assert store.exists(dropped.shard)
    gone = collect_garbage(url, 1.0, delete=True, now=later)
    assert gone.files == dry.files
    assert not any(store.exists(rel) for rel in expected)
    for rel in (kept.shard, kept.keys, "rosters/run.parquet", "notes.txt", "label_set.json"):
        assert store.exists(rel)
    assert label_set.vocabulary() == {"a": 0}
    store.delete("rosters/run.parquet")
    assert verify(url).problems == []
    assert verify(url).units == 1


def test_gc_takes_nothing_while_a_manifest_is_unreadable(tmp_path: Path) -> None:
    label_set, torn, _ = make_set(str(tmp_path))
    path = Path(label_set.store.path(f"manifests/{torn.unit_key}.json"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DamagedError, match="labels drop"):
        collect_garbage(str(tmp_path), 0.0, delete=True)
    assert label_set.store.exists(torn.shard)
    with pytest.raises(ConfigError, match="older-than"):
        collect_garbage(str(tmp_path), -1.0)


def test_gc_keeps_parts_of_a_run_that_lasts_for_days(tmp_path: Path) -> None:
    label_set, first, _ = make_set(str(tmp_path))
    part = "rosters/run.parts/first.parquet"
    label_set.store.write_bytes(part, b"x")
    days_ago = time.time() - 3600 * 100
    for path in [tmp_path / part, *(tmp_path / "manifests").iterdir()]:
        os.utime(path, (days_ago, days_ago))
    assert [file.file for file in collect_garbage(str(tmp_path), 48.0).files] == [part]
    manifest = tmp_path / "manifests" / f"{first.unit_key}.json"
    os.utime(manifest)  # a unit was committed just now, so a run may still be going
    found = collect_garbage(str(tmp_path), 48.0)
    assert (found.files, found.too_young) == ([], 1)


def test_gc_only_lists_unless_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    label_set, dropped, _ = make_set(str(tmp_path))
    label_set.drop_unit(dropped.unit_key)
    shard = Path(label_set.store.path(dropped.shard))
    old = time.time() - 3600 * 50
    os.utime(shard, (old, old))
    assert main(["labels", "gc", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert dropped.shard in shown
    assert "50.0 h" in shown
    assert "kept 2 younger; delete them with --delete" in shown
    assert shard.exists()
    assert main(["labels", "gc", str(tmp_path), "--delete"]) == 0
    assert "deleted 1 file," in capsys.readouterr().out
    assert not shard.exists()


def test_ls_finds_every_set_below_a_url(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, first, second = make_set(url)
    other = make_spec(RecordSpec(kind="tokens"), VOCAB)
    parent = url.rsplit("/", 1)[0]
    LabelSet.create_or_open(f"{parent}/deep/er/tokens", other)
    entries = {entry.url: entry for entry in list_label_sets(parent)}
    assert set(entries) == {url, f"{parent}/deep/er/tokens"}
    entry = entries[url]
    labels = first.num_labels + second.num_labels
    assert (entry.rows, entry.labels, entry.units, entry.quarantined) == (10, labels, 2, 1)
    assert entry.bytes == first.size_bytes + second.size_bytes
    assert entry.bytes_per_label == pytest.approx(entry.bytes / labels)
    assert entry.record == "topk k=8"
    assert entries[f"{parent}/deep/er/tokens"].teacher == "none"
    assert [one.url for one in list_label_sets(url)] == [url]
    assert main(["labels", "ls", parent]) == 0
    assert "topk k=8" in capsys.readouterr().out


def test_ls_shows_the_others_beside_a_broken_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_set(str(tmp_path / "good"))
    make_set(str(tmp_path / "bad"))
    (tmp_path / "bad" / "label_set.json").write_text("{")
    assert main(["labels", "ls", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert str(tmp_path / "good") in shown
    assert "unreadable" in shown
    with pytest.raises(StoreError, match="nowhere: does not exist"):
        list_label_sets(str(tmp_path / "nowhere"))
