"""Dropping a damaged unit, the repair that errors advise."""

from pathlib import Path

import pytest

from cluster.__main__ import main
from schemas.errors import DamagedError, StoreError
from schemas.keys import unit_key
from schemas.label_set.label_set import LabelSet
from schemas.label_set.manifest import Manifest
from schemas.record import LabelRows
from schemas.spec import RecordSpec
from tests.support.label_rows import make_rows, make_spec

VOCAB = 60
SPEC = make_spec(RecordSpec(kind="topk", k=8), VOCAB)


def commit(label_set: LabelSet, rows: LabelRows) -> Manifest:
    return label_set.commit_unit(rows, [], {}, unit_key(rows.row_key))


@pytest.fixture
def label_set(tmp_path: Path) -> LabelSet:
    return LabelSet.create_or_open(str(tmp_path / "labels"), SPEC, {"a": 0})


def test_drop_removes_one_unit_which_can_be_labelled_again(label_set: LabelSet) -> None:
    kept, gone = make_rows(3, SPEC.record, VOCAB, seed=1), make_rows(4, SPEC.record, VOCAB, seed=2)
    commit(label_set, kept)
    manifest = commit(label_set, gone)
    assert main(["labels", "drop", label_set.url, "--unit", manifest.unit_key]) == 0
    assert len(label_set.committed_keys()) == 3
    assert commit(label_set, gone).attempt != manifest.attempt
    assert len(label_set.committed_keys()) == 7


def test_drop_removes_a_torn_manifest(label_set: LabelSet) -> None:
    manifest = commit(label_set, make_rows(3, SPEC.record, VOCAB, seed=1))
    torn = Path(label_set.url) / "manifests" / f"{manifest.unit_key}.json"
    torn.write_bytes(torn.read_bytes()[:-20])
    with pytest.raises(DamagedError, match=f"labels drop .*{manifest.unit_key}"):
        label_set.manifests()
    label_set.drop_unit(manifest.unit_key)
    assert label_set.manifests() == []


@pytest.mark.parametrize("unit", ["00", "../label_set", ""])
def test_drop_refuses_an_unknown_unit(label_set: LabelSet, unit: str) -> None:
    with pytest.raises(StoreError, match="no unit"):
        label_set.drop_unit(unit)
