"""A run whose folder is on s3://: checkpoints, learning curve and student there, and resumed."""

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed as dist
from pyarrow.fs import FSSpecHandler, PyFileSystem

from schemas.config import dump_toml
from schemas.errors import StudentError
from schemas.spec import RecordSpec
from schemas.storage.store import Store
from tests.support import ROOT
from tests.support.s3_server import S3Server
from tests.support.training_runs import make_config, make_world
from trainer.checkpoints.store import find_checkpoint
from trainer.checkpoints.train_progress import TrainProgress
from trainer.checkpoints.writer import CheckpointWriter
from trainer.data.row_order import LoaderState
from trainer.engine.export import upload
from trainer.run_folder import RunFolder
from trainer.tracking.step_lines import StepLines

pytest.importorskip("s3fs", reason="pip install 'tutelage[s3]'")
if importlib.util.find_spec("moto") is None:  # not imported: see s3_server
    pytest.skip("pip install 'tutelage[dev]'", allow_module_level=True)

# Twice in one process, on a Ray of its own whose workers know where the server is. In between the
# newest checkpoint is cut short, and the summary goes, so that the run is not finished any more.
PROGRAM = """
import sys
import ray
from schemas.config import load_toml
from schemas.storage.store import Store
from trainer.config.train import TrainConfig
from trainer.run.launch import run_train_job

config = load_toml(sys.argv[1], TrainConfig)
store = Store(config.run)
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
whole = run_train_job(config)
curve = store.read_bytes("metrics.jsonl")
newest = sorted(store.folders("checkpoints"))[-1]
victim = f"{newest}/mp_rank_00_model_states.pt"
store.write_bytes(victim, store.read_bytes(victim)[:-100])
store.delete("summary.json")
again = run_train_job(config)
ray.shutdown()
assert again.resumed_from_step == 6, again
losses = [line.split(b'"lr"')[0] for line in curve.splitlines()]
assert [line.split(b'"lr"')[0] for line in store.read_bytes("metrics.jsonl").splitlines()] == losses
print(whole.model_dump_json())
"""


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    server = S3Server()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("runs")
        yield server
    server.stop()
    fsspec.filesystem("s3").clear_instance_cache()


def test_run_folder_works_on_s3(server: S3Server, tmp_path: Path) -> None:
    """Everything that a run does with its folder, without a cluster."""
    url = "s3://runs/files"
    folder = RunFolder(url)
    folder.start(make_config(tmp_path, "view", "tokenizer"), "hash", ["set"])
    first, second = folder.claim(), folder.claim()
    folder.check_owner(second)
    with pytest.raises(StudentError, match="was restarted by process"):
        folder.check_owner(first)
    lines = StepLines(folder.store, "rows.jsonl", 0)
    for step in (1, 2, 3):
        lines.append(json.dumps({"step": step}))
    lines.close()
    StepLines(folder.store, "rows.jsonl", 2).close()
    assert folder.store.read_bytes("rows.jsonl") == b'{"step": 1}\n{"step": 2}\n'
    (tmp_path / "student" / "deep").mkdir(parents=True)
    (tmp_path / "student" / "deep" / "weights [1].bin").write_bytes(b"w" * 100)
    upload(folder.store, tmp_path / "student", "student")
    upload(folder.store, tmp_path / "student", "student")
    files = [file.rel for file in folder.store.walk("student")]
    assert files == ["student/deep/weights [1].bin"]


def test_ray_train_writes_through_the_stores_file_system(server: S3Server) -> None:
    """What Ray Train does with the file system that it is given, from another process, too."""
    store = Store("s3://runs/notes")
    notes = pickle.loads(pickle.dumps(PyFileSystem(FSSpecHandler(store.fs))))
    notes.create_dir(store.path("ray", "run"))
    with notes.open_output_stream(store.path("ray", "run", "marker")) as file:
        file.write(b"")
    assert notes.get_file_info(store.path("ray", "run", "marker")).type.name == "File"
    store.delete("ray")
    assert not store.walk("ray")


def test_checkpoints_are_written_and_found_on_s3(server: S3Server, tmp_path: Path) -> None:
    store = Store("s3://runs/checkpoints")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rank", rank=0, world_size=1)
    try:
        job = make_config(tmp_path, "view", "tokenizer", checkpoint={"keep": 2})
        writer = CheckpointWriter(store, "aa", job, lambda: None)
        for step in (3, 6, 9):
            writer.save(Engine(step), progress(step), ["set"])
        writer.wait()
        rel = "checkpoints/step_9-aa/weights.pt"
        store.write_bytes(rel, store.read_bytes(rel)[:-1])
        folder, manifest, skipped = find_checkpoint(store, tmp_path / "cache", True)
    finally:
        dist.destroy_process_group()
    assert folder == tmp_path / "cache" / "step_6-aa"
    assert manifest is not None
    assert manifest.progress == progress(6)
    assert torch.equal(torch.load(folder / "weights.pt"), torch.full((1000,), 6.0))
    assert "weights.pt has" in "".join(skipped)
    assert store.folders("checkpoints") == ["checkpoints/step_6-aa", "checkpoints/step_9-aa"]


class Engine:
    """What a writer needs of a DeepSpeed engine."""

    def __init__(self, value: int) -> None:
        self.weights, self.checkpoint_engine = torch.full((1000,), float(value)), None

    def save_checkpoint(self, root: str, tag: str, save_latest: bool) -> None:
        self.checkpoint_engine.save(self.weights, f"{root}/{tag}/weights.pt")


def progress(step: int) -> TrainProgress:
    loader = LoaderState(view_hash="v", seed=0, epoch=0, step=step)
    return TrainProgress(step=step, loader=loader, tokens=0, labels=0, final_loss=0.0, pending={})


def test_run_resumes_on_s3(server: S3Server, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    fs = fsspec.filesystem("s3")
    view, tokenizer = make_world(tmp_path, RecordSpec(kind="topk", k=4))
    config = make_config(
        tmp_path / "run",
        view.url,
        str(tokenizer),
        data={"steps": 9},
        deepspeed={"zero_stage": 1},
        ray={"num_workers": 2},
        log={"tensorboard": True},
    )
    config = config.model_copy(update={"run": "s3://runs/one"})
    (tmp_path / "train.toml").write_text(dump_toml(config))
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "train.toml")],
        env={**environment, "RAY_ADDRESS": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["exported"] == "s3://runs/one/student"
    assert "step_9-" in result.stderr
    assert "skipped: mp_rank_00_model_states.pt has" in result.stderr
    there = fs.find("runs/one")
    assert "runs/one/student/model.safetensors" in there
    assert any(path.startswith("runs/one/tensorboard/") for path in there)
    assert not any(path.startswith("runs/one/ray/") for path in there)
