"""Progress of the actions that can take long."""

from pathlib import Path

import pyarrow as pa
import pytest

from cluster.__main__ import main
from schemas.console.text import size_text
from schemas.keys import unit_key
from schemas.label_set.label_set import LabelSet
from schemas.label_set.roster import close_roster, write_part
from schemas.spec import RecordSpec
from tests.support.label_rows import make_rows, make_spec


def make_run(url: str) -> LabelSet:
    """A finished run of two units with 20 rows each."""
    record = RecordSpec(kind="topk", k=8)
    label_set = LabelSet.create_or_open(url, make_spec(record, 60))
    rows = make_rows(40, record, 60)
    for part in (rows.slice(0, 20), rows.slice(20, 40)):
        label_set.commit_unit(part, [], {}, unit_key(part.row_key))
    part = {
        "row_key": [key.tobytes() for key in rows.row_key],
        "source": ["a.py"] * 40,
        "place": pa.array(range(40), pa.int64()),
        "window": pa.array([0] * 40, pa.int32()),
        "sample": pa.array([-1] * 40, pa.int32()),
        "columns": [""] * 40,
    }
    write_part(label_set.store, "r1", pa.table(part))
    close_roster(label_set, "r1")
    return label_set


def test_long_actions_show_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("schemas.console.progress.LINE_INTERVAL_S", 0.0)
    label_set = make_run(str(tmp_path / "labels"))
    size = sum(manifest.size_bytes for manifest in label_set.manifests())
    label_set.store.write_bytes("shards/lost.parquet", b"")
    url, out = label_set.url, str(tmp_path / "out")
    for words, last in (
        (["verify", url], f"verify: checked {size_text(size)} of {size_text(size)}"),
        (["export", url, out, "--format", "axolotl"], "export: wrote 40 of 40 rows"),
        (["report", url, "--out", f"{out}/r.html"], "report: read 2 of 2 row groups"),
        (["view", f"{out}/view", "--from", url], "view: read 2 of 2 units"),
        (["gc", url, "--older-than", "0", "--delete"], "gc: deleted 1 of 1 files"),
    ):
        assert main(["labels", *words]) == 0
        assert capsys.readouterr().err.splitlines()[-1] == last
