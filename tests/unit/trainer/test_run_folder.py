"""The run folder: one run only, and a learning curve without repeats."""

import os
import shutil
from pathlib import Path

import pytest

from schemas.errors import ConfigError, DamagedError, StudentError
from schemas.storage.local_files import replace_file
from schemas.storage.store import Store
from tests.support.training_runs import losses, make_config
from trainer.run_folder import RunFolder, TrainSummary
from trainer.tracking.learning_curve import LearningCurve, Point


def summary(run: Path) -> TrainSummary:
    return TrainSummary(
        run=str(run),
        world_size=1,
        zero_stage=0,
        steps=12,
        tokens=100,
        labels=90,
        stopped_early=False,
        best_eval=None,
        best_eval_step=0,
        resumed_from_step=0,
        final_loss=0.1,
        seconds=1.0,
        tokens_per_s=100.0,
        data_wait_share=0.0,
        rows_dropped=0,
        view_hash="hash",
        label_sets=["set"],
        exported=str(run / "student"),
    )


def point(step: int) -> Point:
    return Point(
        step=step,
        tokens=10 * step,
        loss=1 / step,
        ce=1.0,
        kl=0.0,
        lr=0.1,
        grad_norm=1.0,
        tokens_per_s=1.0,
        data_wait_share=0.0,
        peak_rss_bytes=1,
        peak_gpu_bytes=0,
    )


def started(run: Path) -> RunFolder:
    """The folder of a run that has saved a checkpoint."""
    folder = RunFolder(str(run))
    folder.start(make_config(run, "view", "tokenizer"), "hash", ["set"])
    (run / "checkpoints" / "step_1").mkdir(parents=True)
    return folder


def test_run_folder_resumes_and_knows_a_finished_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder, config = started(run), make_config(run, "view", "tokenizer")
    assert folder.finished(config, "hash", ["set"]) is None
    folder.finish(summary(run))
    assert folder.finished(config, "hash", ["set"]) == summary(run)


@pytest.mark.parametrize(
    ("changes", "view_hash", "named"),
    [
        ({"optimizer": {"lr": 0.5}}, "hash", r"optimizer\.lr \(found 0\.01, now 0\.5\)"),
        ({"data": {"seed": 3}}, "hash", r"data\.seed"),
        ({"student": {"seed": 3}}, "hash", r"student\.seed"),
        ({"deepspeed": {"native": {"x": 1}}}, "hash", r"deepspeed\.native"),
        ({}, "other", "view hash"),
    ],
)
def test_run_folder_refuses_another_run(
    tmp_path: Path, changes: dict[str, dict[str, object]], view_hash: str, named: str
) -> None:
    folder = started(tmp_path)
    changed = make_config(tmp_path, "view", "tokenizer", **changes)
    with pytest.raises(ConfigError, match=named):
        folder.finished(changed, view_hash, ["set"])


def test_run_folder_accepts_changes_before_the_first_checkpoint(tmp_path: Path) -> None:
    folder = started(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    changed = make_config(tmp_path, "view", "tokenizer", optimizer={"lr": 0.5})
    assert folder.finished(changed, "hash", ["set"]) is None
    folder.start(changed, "hash", ["set"])
    (tmp_path / "checkpoints" / "step_1").mkdir(parents=True)
    assert folder.finished(changed, "hash", ["set"]) is None


def test_run_folder_accepts_changes_that_do_not_change_the_training(tmp_path: Path) -> None:
    moved = make_config(
        tmp_path,
        "moved/view",
        "tokenizer",
        ray={"address": "auto", "cpus_per_worker": 2, "num_workers": {"min": 2, "max": 5}},
        checkpoint={"keep": 9},
        data={"prefetch_steps": 5},
    )
    assert started(tmp_path).finished(moved, "hash", ["set"]) is None


def test_run_folder_names_its_damage(tmp_path: Path) -> None:
    folder, config = started(tmp_path), make_config(tmp_path, "view", "tokenizer")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DamagedError, match=r"run\.json"):
        folder.finished(config, "hash", ["set"])


def test_run_folder_lets_only_the_last_owner_write(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    first = folder.claim()
    folder.check_owner(first)
    second = folder.claim()
    folder.check_owner(second)
    with pytest.raises(StudentError, match=f"restarted by process {os.getpid()}"):
        folder.check_owner(first)
    with pytest.raises(StudentError, match="on a shared file system"):
        RunFolder(str(tmp_path / "elsewhere")).check_owner(second)


def test_curve_drops_points_after_the_checkpoint(tmp_path: Path) -> None:
    path, store = tmp_path / "metrics.jsonl", Store(str(tmp_path))
    curve = LearningCurve(store, make_config(tmp_path / "run", "view", "tokenizer"), done=0)
    for step in (1, 2, 3):
        curve.append(point(step))
    curve.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # a line that a killed process began
    curve = LearningCurve(store, make_config(tmp_path / "run", "view", "tokenizer"), done=2)
    curve.append(point(3))
    curve.close()
    assert losses(tmp_path) == [1.0, 1 / 2, 1 / 3]


def test_replace_file_leaves_only_the_new_content(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    replace_file(path, b"one")
    replace_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert [child.name for child in path.parent.iterdir()] == ["file"]
