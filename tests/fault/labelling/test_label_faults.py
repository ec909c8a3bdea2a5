"""At least 20 kills of label jobs and of what they are made of; `make fault` runs it.

`TUTELAGE_FAULT_SEED` sets the seed, `TUTELAGE_FAULT_OUT` a folder for the table.
"""

import json
import os
import signal
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.support.label_faults import JOB_POINTS, TEACHER_POINTS, FaultRun

SEED = int(os.environ.get("TUTELAGE_FAULT_SEED", "20261125"))
NUM_ROWS = 1500


@pytest.fixture
def address(ray_session: None) -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)


def test_nothing_is_lost_or_doubled(tmp_path: Path, address: str) -> None:
    run = FaultRun(tmp_path, SEED, NUM_ROWS, address)
    kill_jobs(run)
    kill_teachers(run)
    kill_engines(run)
    for point in JOB_POINTS:
        with run.job("run.unit_rows=64") as job:
            run.kill_at(point, job, "job")
    table = run.settle()
    print(table)
    kills = [fault for fault in run.table if fault.fault.startswith("SIGKILL")]
    assert len(kills) >= 20
    assert all(fault.lost == fault.doubled == 0 for fault in run.table)
    if "TUTELAGE_FAULT_OUT" in os.environ:
        out = Path(os.environ["TUTELAGE_FAULT_OUT"])
        out.mkdir(parents=True, exist_ok=True)
        (out / f"labelling-{SEED}.md").write_text(table + "\n")
        faults = [asdict(fault) for fault in run.table]
        (out / f"labelling-{SEED}.json").write_text(json.dumps(faults, indent=1) + "\n")


def kill_jobs(run: FaultRun) -> None:
    """The job itself, again and again, and twice in order."""
    for _ in range(5):
        with run.job() as job:
            run.kill_job(job)
    with run.job() as job:
        run.kill_at("before_roster_part", job, "tokenising task")
        run.stop_job(job, signal.SIGTERM)
    with run.job() as job:
        run.stop_job(job, signal.SIGINT)


def kill_teachers(run: FaultRun) -> None:
    """The teacher's process in one job, at random and at every step of a commit."""
    with run.job() as job:
        faults = [*TEACHER_POINTS, *[""] * 4]
        run.rng.shuffle(faults)
        for point in faults:
            if point:
                run.kill_at(point, job, "teacher actor")
            else:
                job.wait_for_units(1)
                run.kill_teacher(job)
        job.wait_for_units(2)


def kill_engines(run: FaultRun) -> None:
    """The engine of vLLM, in a process of its own; once it is stopped and has to be found out."""
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    words = ["teacher.backend=vllm", "run.address=", "run.stall_s=75", "run.unit_rows=8"]
    words += ["teacher.engine.kv_cache_memory_bytes=268435456", "teacher.engine.max_num_seqs=16"]
    with run.job(*words, environment=environment) as job:
        for _ in range(2):
            run.signal_engine(job, signal.SIGKILL)
        run.signal_engine(job, signal.SIGSTOP)
        job.wait_for_units(2)
