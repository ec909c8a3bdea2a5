"""A run whose folder is on s3://: checkpoints, learning curve and student there, and resumed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from s3_server import S3Server
from training_runs import make_config, make_world

from schemas.config import dump_toml
from schemas.spec import RecordSpec

pytest.importorskip("s3fs", reason="pip install 'tutelage[s3]'")
if importlib.util.find_spec("moto") is None:  # not imported: see s3_server
    pytest.skip("pip install 'tutelage[dev]'", allow_module_level=True)

ROOT = Path(__file__).parents[2]
# Twice in one process, on a Ray of its own whose workers know where the server is. In between the
# newest checkpoint is cut short, and the summary goes, so that the run is not finished any more.
PROGRAM = """
import sys
import ray
from schemas.config import load_toml
from schemas.storage import Store
from trainer.config import TrainConfig
from trainer.launch import run_train_job

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


def test_a_run_on_an_object_store(tmp_path: Path) -> None:
    server = S3Server()
    try:
        environment = {**os.environ, **server.environment, "PYTHONPATH": str(ROOT)}
        fs = fsspec.filesystem("s3", skip_instance_cache=True, **options(server))
        fs.mkdir("runs")
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
        assert "passed over: mp_rank_00_model_states.pt has" in result.stderr
        there = fs.find("runs/one")
        assert "runs/one/student/model.safetensors" in there
        assert any(path.startswith("runs/one/tensorboard/") for path in there)
        assert not any(path.startswith("runs/one/ray/") for path in there)
    finally:
        server.stop()


def options(server: S3Server) -> dict[str, object]:
    return {
        "key": server.environment["AWS_ACCESS_KEY_ID"],
        "secret": server.environment["AWS_SECRET_ACCESS_KEY"],
        "client_kwargs": {
            "endpoint_url": server.environment["AWS_ENDPOINT_URL"],
            "region_name": server.environment["AWS_DEFAULT_REGION"],
        },
    }
