"""Training that is killed and damaged at seeded moments, against a run that nothing happened to.

The seed is printed; ``TUTELAGE_FAULT_SEED`` repeats it. The table goes to
``$TUTELAGE_FAULT_TABLE`` where that is set.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from schemas.config import CountRange
from schemas.spec import RecordSpec
from tests.support import ROOT
from tests.support.training_faults import Trial, loss_difference, samples, table
from tests.support.training_runs import make_config, make_world
from trainer.config.train import TrainConfig
from trainer.run.launch import run_train_job

STEPS = 50
SECTIONS: dict[str, dict[str, Any]] = {
    # Neither two nor three workers divide the lanes, and a step takes longer than to kill it.
    "data": {"sequences_per_step": 17, "steps": STEPS},
    "optimizer": {"lr": 3e-3, "weight_decay": 0.5},
    "schedule": {"kind": "constant", "warmup_steps": 2},
    "ray": {"num_workers": 2, "cpus_per_worker": 1, "max_failures": 20},
    "checkpoint": {"every_steps": 2, "keep": 2},
    "log": {"every_steps": 1, "rows": True, "tensorboard": False},
}
CHAIN = [
    "rank",
    "first file",
    "driver",
    "all files",
    "all ranks",
    "manifest",
    "checkpoint",
    "rank",
    "shard",
    "driver",
]


@pytest.fixture(scope="module")
def seed() -> int:
    chosen = int(os.environ.get("TUTELAGE_FAULT_SEED", random.randrange(10**6)))
    print(f"TUTELAGE_FAULT_SEED={chosen}")
    return chosen


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    """Room for the workers of a driver and for what Ray still holds for those that were killed."""
    import ray

    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    # Or it starts a process for every CPU.
    os.environ["RAY_prestart_worker_first_driver"] = "0"  # noqa: SIM112  (its name)
    ray.shutdown()
    ray.init(address="local", num_cpus=32, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("training_faults")
    view, tokenizer = make_world(folder, RecordSpec(kind="topk", k=4))

    def config(name: str, **changes: dict[str, Any]) -> TrainConfig:
        sections = {key: {**values} for key, values in SECTIONS.items()}
        for key, values in changes.items():
            sections[key] = {**sections.get(key, {}), **values}
        return make_config(folder / name, view.url, str(tokenizer), **sections)

    return config


@pytest.fixture(scope="module")
def undisturbed(make: Any) -> Path:
    config = make("undisturbed", deepspeed={"zero_stage": 2})
    run_train_job(config)
    return Path(config.run)


@pytest.fixture(scope="module")
def trials() -> list[Trial]:
    return []


@pytest.fixture(scope="module", autouse=True)
def _table(trials: list[Trial], undisturbed: Path) -> Iterator[None]:
    yield
    text = table(trials, undisturbed)
    print(f"\n{text}")
    if os.environ.get("TUTELAGE_FAULT_TABLE"):
        Path(os.environ["TUTELAGE_FAULT_TABLE"]).write_text(text)


def test_killed_ten_times_on_the_same_workers(
    make: Any, undisturbed: Path, trials: list[Trial], seed: int
) -> None:
    trial = Trial("2 workers, ZeRO-2", make("killed", deepspeed={"zero_stage": 2}), rng(seed, 1))
    trials.append(trial)
    for number, what in enumerate(CHAIN):
        trial.fault(what, after_step=5 + 4 * number)
    summary = trial.finish()
    assert summary.steps == STEPS
    assert samples(trial.run) == samples(undisturbed)
    assert loss_difference(trial.run, undisturbed) == 0.0


@pytest.mark.parametrize("zero_stage", [3, 0])
def test_two_then_three_workers_then_one(
    make: Any, undisturbed: Path, trials: list[Trial], seed: int, zero_stage: int
) -> None:
    config = make(f"resized_{zero_stage}", deepspeed={"zero_stage": zero_stage})
    name = f"2 -> 3 -> 1 workers, ZeRO-{zero_stage}"
    trial = Trial(name, config, rng(seed, 2 + zero_stage))
    trials.append(trial)
    trial.fault("driver", after_step=10)
    if zero_stage == 3:
        assert_groups_keep_their_own(trial)
    trial.start(num_workers=CountRange(min=1, max=3))  # there is room for more than three
    trial.fault("driver", after_step=30)
    trial.config = trial.config.model_copy(
        update={"ray": trial.config.ray.model_copy(update={"num_workers": 1})}
    )
    summary = trial.finish()
    assert summary.world_size == 1
    assert "now on 3 workers instead of 2" in trial.said()
    assert samples(trial.run) == samples(undisturbed)
    assert loss_difference(trial.run, undisturbed) <= 1e-5


def assert_groups_keep_their_own(trial: Trial) -> None:
    """The optimizer of a process that loads what two ranks saved."""
    trial.stop()
    code = "import sys; from tests.support.optimizer_groups import main; main(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", code, str(trial.run / "config.toml")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["saved_by"] == 2
    assert found["separate_steps"]
    assert len(set(found["steps"])) == 1
    matrices, norms = found["groups"]
    assert matrices["weight_decay"] == 0.5
    assert norms["weight_decay"] == 0.0


def rng(seed: int, number: int) -> random.Random:
    return random.Random(f"{seed} {number}")
