"""Label sets: exclusive creation, exactly-once commits whatever dies, and damage that is named."""

import json
import os
import pickle
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schemas.errors import DamagedError, RecordError, StoreError
from schemas.keys import contains, unit_key
from schemas.label_set import shards
from schemas.label_set.label_set import LabelSet, QuarantineRow
from schemas.label_set.manifest import Manifest, read_manifest
from schemas.record import LabelRows
from schemas.spec import RecordSpec
from schemas.storage.store import Store
from tests.support.label_rows import make_rows, make_spec

VOCAB = 60
RECORD = RecordSpec(kind="topk", k=8)
SPEC = make_spec(RECORD, VOCAB)


def quarantined(number: int) -> QuarantineRow:
    return QuarantineRow(bytes([255, number]) * 8, "src.txt", number, 0, "too_long", "99 tokens")


def commit(label_set: LabelSet, rows: LabelRows, *bad: QuarantineRow) -> Manifest:
    return label_set.commit_unit(rows, bad, {"backend": "test"}, unit_key(rows.row_key))


@pytest.fixture
def label_set(tmp_path: Path) -> LabelSet:
    return LabelSet.create_or_open(str(tmp_path / "labels"), SPEC, {"a": 0, "é\n": 1})


class TestCreation:
    def test_opens_what_was_made(self, label_set: LabelSet) -> None:
        for again in (
            LabelSet.create_or_open(label_set.url, SPEC),
            LabelSet.open(label_set.url),
            pickle.loads(pickle.dumps(label_set)),
        ):
            assert again.spec == SPEC
            assert again.fingerprint == SPEC.fingerprint()
            assert again.vocabulary() == {"a": 0, "é\n": 1}
            assert again.manifests() == []
            assert len(again.index()) == len(again.quarantine()) == 0
            assert len(again.committed_keys()) == len(again.quarantined_keys()) == 0

    def test_another_spec_is_refused_with_the_difference(self, label_set: LabelSet) -> None:
        other = make_spec(RecordSpec(kind="topk", k=4), VOCAB, weights_digest="other")
        before = sorted(Path(label_set.store.root).rglob("*"))
        with pytest.raises(StoreError) as caught:
            LabelSet.create_or_open(label_set.url, other, {"b": 0})
        assert "record.k: 8 / 4" in str(caught.value)
        assert "teacher.weights_digest: 'weights' / 'other'" in str(caught.value)
        assert sorted(Path(label_set.store.root).rglob("*")) == before

    def test_less_than_what_is_there_is_served_and_more_is_not(self, label_set: LabelSet) -> None:
        less = make_spec(RecordSpec(kind="topk", k=4, entropy=False), VOCAB)
        assert LabelSet.create_or_open(label_set.url, less).spec == SPEC
        more = make_spec(RecordSpec(kind="topk", k=9), VOCAB)
        with pytest.raises(StoreError, match=r"record\.k: 8 / 9.*record\.k: only 8 stored"):
            LabelSet.create_or_open(label_set.url, more)

    def test_many_creators_agree(self, tmp_path: Path) -> None:
        url = str(tmp_path / "labels")
        specs = [make_spec(RECORD, VOCAB, weights_digest=digest) for digest in ("a", "b")]
        results: list[Any] = []

        def create(number: int) -> None:
            try:
                made = LabelSet.create_or_open(url, specs[number % 2], {str(number % 2): 0})
                results.append((number % 2, made.vocabulary()))
            except StoreError:
                results.append(None)

        threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        won = [result for result in results if result is not None]
        assert len(results) == 8
        assert len(won) == 4
        assert all(result == (won[0][0], {str(won[0][0]): 0}) for result in won)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="no label set there"):
            LabelSet.open(str(tmp_path / "none"))

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"spec": 3}', '{"spec": {}}'])
    def test_torn_description_is_named(self, label_set: LabelSet, text: str) -> None:
        label_set.store.write_bytes("label_set.json", text.encode())
        with pytest.raises(DamagedError, match=r"label_set\.json: not a valid label set"):
            LabelSet.open(label_set.url)

    def test_edited_description_is_named(self, label_set: LabelSet) -> None:
        content = json.loads(label_set.store.read_bytes("label_set.json"))
        content["spec"]["record"]["k"] = 9
        label_set.store.write_bytes("label_set.json", json.dumps(content).encode())
        with pytest.raises(DamagedError, match="records fingerprint"):
            LabelSet.open(label_set.url)

    def test_later_schema_version_is_named(self, label_set: LabelSet) -> None:
        content = json.loads(label_set.store.read_bytes("label_set.json"))
        content["spec"]["schema_version"] = 99
        content["spec"]["record"]["from_the_future"] = True
        label_set.store.write_bytes("label_set.json", json.dumps(content).encode())
        with pytest.raises(StoreError, match="schema version 99") as caught:
            LabelSet.open(label_set.url)
        assert not isinstance(caught.value, DamagedError)

    def test_changed_vocabulary_is_named(self, label_set: LabelSet) -> None:
        (name,) = label_set.store.list(".", ".json")[1:]
        label_set.store.write_bytes(name, b'{"a": 5}')
        with pytest.raises(DamagedError, match="have different digests"):
            label_set.vocabulary()

    def test_made_without_a_vocabulary(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="without a vocabulary"):
            LabelSet.create_or_open(str(tmp_path / "x"), SPEC).vocabulary()


class TestCommit:
    def test_a_unit(self, label_set: LabelSet, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 2000)
        rows = make_rows(20, RECORD, VOCAB)
        manifest = commit(label_set, rows, quarantined(1), quarantined(2))
        assert label_set.manifests() == [manifest]
        assert manifest.num_rows == 20
        assert manifest.num_labels == rows.num_labels
        assert manifest.num_quarantined == 2
        assert len(manifest.row_groups) > 1
        index = label_set.index()
        assert index.column("row_key").to_pylist() == [key.tobytes() for key in rows.row_key]
        assert index.column("num_tokens").to_pylist() == np.diff(rows.token_offsets).tolist()
        assert contains(label_set.committed_keys(), rows.row_key).all()
        assert label_set.quarantine().to_pylist()[1] == {
            "row_key": bytes([255, 2]) * 8, "source": "src.txt", "place": 2, "window": 0,
            "reason": "too_long", "detail": "99 tokens",
        }  # fmt: skip
        order = [17, 3, 3, 0]
        got = label_set.read_rows(index.take(order))
        assert got.to_table(RECORD).equals(rows.to_table(RECORD).take(order))
        assert len(label_set.read_rows(index.slice(0, 0))) == 0

    def test_again_gives_the_first_manifest(self, label_set: LabelSet) -> None:
        rows = make_rows(6, RECORD, VOCAB)
        first = commit(label_set, rows)
        assert commit(label_set, rows) == first
        assert len(label_set.store.list("shards")) == 1

    def test_unit_of_quarantined_rows_only(self, label_set: LabelSet) -> None:
        for rows in (None, make_rows(0, RECORD, VOCAB)):
            manifest = label_set.commit_unit(rows, [quarantined(3)], {}, "onlybad")
            assert (manifest.shard, manifest.keys, manifest.num_rows) == ("", "", 0)
        assert len(label_set.quarantined_keys()) == 1
        assert len(label_set.index()) == 0

    def test_labelled_since_leaves_quarantine(self, label_set: LabelSet) -> None:
        rows = make_rows(4, RECORD, VOCAB)
        key = rows.row_key[2].tobytes()
        bad = QuarantineRow(key, "s", 1, 0, "engine", "")
        label_set.commit_unit(None, [bad, quarantined(1)], {}, "first")
        assert len(label_set.quarantined_keys()) == 2
        commit(label_set, rows)
        assert label_set.quarantine().column("place").to_pylist() == [1]

    def test_row_in_two_units_is_read_once_from_the_smallest(self, label_set: LabelSet) -> None:
        rows = make_rows(6, RECORD, VOCAB)
        label_set.commit_unit(rows.slice(0, 4), [], {}, "bbb")
        label_set.commit_unit(rows.slice(2, 6), [], {}, "aaa")
        index = label_set.index()
        assert len(index) == 6
        by_key = dict(zip(index["row_key"].to_pylist(), index["unit_key"].to_pylist(), strict=True))
        found = [by_key[key.tobytes()] for key in rows.row_key]
        assert found == ["bbb", "bbb", "aaa", "aaa", "aaa", "aaa"]

    def test_refuses(self, label_set: LabelSet) -> None:
        rows = make_rows(3, RECORD, VOCAB)
        with pytest.raises(RecordError, match="neither labelled nor quarantined"):
            label_set.commit_unit(None, [], {}, "x")
        with pytest.raises(RecordError, match="more than once"):
            label_set.commit_unit(LabelRows.concat([rows, rows]), [], {}, "x")
        for bad in ("", "../x", "a b", "a.b"):
            with pytest.raises(RecordError, match="unit key"):
                label_set.commit_unit(rows, [], {}, bad)
        assert label_set.manifests() == []

    def test_of_many_committers_one_wins_and_all_get_it(self, label_set: LabelSet) -> None:
        rows = make_rows(6, RECORD, VOCAB)
        key = unit_key(rows.row_key)
        start = threading.Barrier(6)
        got: list[Manifest] = []

        def attempt(number: int) -> None:
            start.wait()
            # One of them could not label a row that others could: their files must not mix.
            mine = rows.slice(0, 5) if number % 2 else rows
            bad = [QuarantineRow(rows.row_key[5].tobytes(), "s", 5, 0, "engine", "")]
            got.append(label_set.commit_unit(mine, bad if number % 2 else [], {"n": number}, key))

        threads = [threading.Thread(target=attempt, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (manifest,) = label_set.manifests()
        assert got == [manifest] * 6
        index = label_set.index()
        assert len(index) + len(label_set.quarantine()) == 6
        assert len(label_set.read_rows(index)) == manifest.num_rows


STEPS = [
    (name, when)
    for name in ("write_shard", "keys/", "quarantine/", "create", "link")
    for when in ("before", "after")
]


@pytest.mark.parametrize(("step", "when"), STEPS)
def test_commit_survives_a_kill_between_any_two_steps(
    label_set: LabelSet, step: str, when: str
) -> None:
    """A child is killed by SIGKILL in its commit; what is left is a whole unit or none."""
    rows = make_rows(6, RECORD, VOCAB)
    child = os.fork()
    if child == 0:
        try:
            _die_at(step, when)
            commit(label_set, rows, quarantined(1))
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL

    again = LabelSet.open(label_set.url)
    committed = again.manifests()
    assert len(committed) == (when == "after" and step in ("create", "link"))
    if not committed:
        assert len(again.index()) == len(again.quarantine()) == 0
    manifest = commit(again, rows, quarantined(1))
    assert again.manifests() == [manifest]
    if committed:
        assert manifest == committed[0]
    got = again.read_rows(again.index())
    assert got.to_table(RECORD).equals(rows.to_table(RECORD))
    assert len(again.quarantine()) == 1


def _die_at(step: str, when: str) -> None:
    """Makes this process kill itself before or after one step of the next commit."""
    from schemas.label_set import label_set as module
    from schemas.storage import store

    owners: dict[str, tuple[Any, str]] = {
        "write_shard": (module, "write_shard"),
        "keys/": (Store, "write_bytes"),
        "quarantine/": (Store, "write_bytes"),
        "create": (Store, "create_exclusive"),
        "link": (store.os, "link"),
    }
    owner, name = owners[step]
    original: Callable[..., Any] = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> None:
        if name == "write_bytes" and not args[1].startswith(step):
            original(*args, **kwargs)
            return
        if when == "after":
            original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, dying)


class TestDamage:
    @pytest.fixture
    def manifest(self, label_set: LabelSet) -> Manifest:
        return commit(label_set, make_rows(6, RECORD, VOCAB), quarantined(1))

    @pytest.mark.parametrize("text", ["", "{", '{"unit_key": "x"}', "null"])
    def test_torn_manifest(self, label_set: LabelSet, manifest: Manifest, text: str) -> None:
        rel = f"manifests/{manifest.unit_key}.json"
        label_set.store.write_bytes(rel, text.encode())
        with pytest.raises(DamagedError) as caught:
            label_set.manifests()
        assert label_set.store.path(rel) in str(caught.value)
        assert f"labels drop {label_set.url} --unit {manifest.unit_key}" in str(caught.value)

    def test_manifest_of_another_set(self, label_set: LabelSet, manifest: Manifest) -> None:
        other = manifest.model_copy(update={"fingerprint": "0" * 32})
        rel = f"manifests/{manifest.unit_key}.json"
        label_set.store.write_bytes(rel, other.model_dump_json().encode())
        with pytest.raises(DamagedError, match="belongs to a label set with fingerprint 000"):
            label_set.manifests()

    def test_manifest_of_another_unit(self, label_set: LabelSet, manifest: Manifest) -> None:
        label_set.store.write_bytes("manifests/abc.json", manifest.model_dump_json().encode())
        with pytest.raises(DamagedError, match=f"is the manifest of unit {manifest.unit_key}"):
            read_manifest(label_set.store, "manifests/abc.json", label_set.fingerprint)

    @pytest.mark.parametrize("what", ["keys", "quarantine"])
    @pytest.mark.parametrize("how", ["gone", "cut", "other"])
    def test_small_files(
        self, label_set: LabelSet, manifest: Manifest, what: str, how: str
    ) -> None:
        rel = getattr(manifest, what)
        path = Path(label_set.store.path(rel))
        if how == "gone":
            path.unlink()
        elif how == "cut":
            path.write_bytes(path.read_bytes()[:-20])
        else:
            longer = commit(label_set, make_rows(9, RECORD, VOCAB, 1), *map(quarantined, (5, 6)))
            path.write_bytes(Path(label_set.store.path(getattr(longer, what))).read_bytes())
        with pytest.raises(DamagedError) as caught:
            label_set.index() if what == "keys" else label_set.quarantine()
        assert str(path) in str(caught.value)
        assert f"--unit {manifest.unit_key}" in str(caught.value)

    def test_shard(self, label_set: LabelSet, manifest: Manifest) -> None:
        path = Path(label_set.store.path(manifest.shard))
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 3] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(DamagedError) as caught:
            label_set.read_rows(label_set.index())
        message = str(caught.value)
        assert f"{path}: damaged, row group 0: " in message
        assert f"`tutelage labels drop {label_set.url} --unit {manifest.unit_key}`" in message
