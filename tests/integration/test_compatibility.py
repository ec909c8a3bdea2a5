"""Label sets, views and run folders written by earlier code stay usable; see tests/data."""

import json
import shutil
from pathlib import Path

import pytest

from labeler.config import LabelConfig
from labeler.run.job import run_label_job
from schemas.config import load_toml
from schemas.label_set.label_set import LabelSet
from schemas.maintenance.verify import verify
from schemas.views.view import View
from tests.support import ROOT
from tests.support.rank_pool import train
from trainer.config.train import TrainConfig

EARLIER = ROOT / "tests" / "data" / "made_by_ef9d078"
STOPPED_AFTER = 12


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what the earlier code left, as the working directory."""
    folder = tmp_path / "moved"
    shutil.copytree(EARLIER, folder)
    monkeypatch.chdir(folder)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_verify_finds_nothing_in_an_earlier_label_set(earlier: Path) -> None:
    result = verify("labels")
    assert result.problems == []
    assert (result.rows, result.labels) == (99, 7395)


def test_label_job_reuses_every_earlier_row(earlier: Path, ray_session: None) -> None:
    before = files_of(earlier / "labels")
    config = load_toml("label.toml", LabelConfig, ["view=views/new"])
    summary = run_label_job(config, progress=False)
    assert (summary.rows_labelled, summary.rows_reused, summary.rows_duplicate) == (0, 99, 1)
    assert summary.rows_quarantined == 1
    # No label, key table or manifest is touched: a run adds its roster and nothing else.
    after = files_of(earlier / "labels")
    new = sorted(set(after) - set(before))
    assert {name: after[name] for name in before} == before
    assert [name.partition("/")[0] for name in new] == ["rosters"] * len(new)
    old_rows, new_rows = View.open("views/all"), View.open("views/new")
    assert old_rows.num_labels == new_rows.num_labels == 7395


def test_view_and_label_set_of_earlier_code_open(earlier: Path) -> None:
    view = View.open("views/train")
    assert (view.num_rows, view.num_tokens, view.num_labels) == (99, 8619, 7395)
    assert view.view_hash == "c8c0615061d05dce37cea1368df16ba9"
    stored = json.loads((earlier / "labels" / "label_set.json").read_text())
    assert LabelSet.open("labels").spec.fingerprint() == stored["fingerprint"]


def test_earlier_run_continues_with_the_same_losses(earlier: Path) -> None:
    summary = train(load_toml("train.toml", TrainConfig))
    assert summary.resumed_from_step == STOPPED_AFTER
    points = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    losses = [point["loss"] for point in points if point["kind"] == "train"]
    recorded = json.loads(Path("losses.json").read_text())
    if _cpu() == recorded["cpu"]:
        assert losses == recorded["losses"]
    else:  # other vector units round matrix products in another order
        assert losses == pytest.approx(recorded["losses"], rel=1e-4)


def _cpu() -> str:
    """Name and revision of the processor, on which the last bits of matrix products depend."""
    facts: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    return " ".join(
        facts.get(name, "?") for name in ("model name", "cpu family", "model", "stepping")
    )
