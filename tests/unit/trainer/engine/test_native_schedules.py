"""DeepSpeed's own schedulers, asked for any step in any order."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.errors import ConfigError
from tests.support.training_runs import make_config
from trainer.engine.learning_rate import LearningRate

NUM_STEPS, PEAK = 12, 0.3
SCHEDULERS: list[dict[str, Any]] = [
    {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_type": "linear"}},
    {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 4}},
    {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 3, "total_num_steps": "auto"}},
    {"type": "LRRangeTest", "params": {"lr_range_test_step_size": 5}},
    {
        "type": "OneCycle",
        "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_momentum": False},
    },
]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setenv("DS_ACCELERATOR", os.environ.get("DS_ACCELERATOR", "cpu"))


def learning_rate(scheduler: dict[str, Any]) -> LearningRate:
    native = {"optimizer": {"type": "SGD", "params": {"lr": PEAK}}, "scheduler": scheduler}
    config = make_config(
        Path("run"), "v", "t", optimizer={"lr": 1e-4}, deepspeed={"native": native}
    )
    return LearningRate(config, NUM_STEPS)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda section: section["type"])
def test_native_schedule_gives_deepspeeds_rate_at_any_step(scheduler: dict[str, Any]) -> None:
    from deepspeed.runtime import lr_schedules

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    params = dict(scheduler["params"])
    if scheduler["type"] in ("WarmupDecayLR", "WarmupCosineLR"):
        params["total_num_steps"] = NUM_STEPS
    theirs = getattr(lr_schedules, scheduler["type"])(optimizer, **params)
    expected = []
    for _ in range(NUM_STEPS):
        expected.append(optimizer.param_groups[0]["lr"])
        theirs.step()
    rate = learning_rate(scheduler)
    assert len(set(expected)) > 2
    for step in (7, 1, 12, 3, *range(1, NUM_STEPS + 1)):
        assert rate(step) == expected[step - 1], step


def test_native_schedule_names_an_unknown_parameter() -> None:
    with pytest.raises(ConfigError, match=r"scheduler\.params.*'warmup'"):
        learning_rate({"type": "WarmupLR", "params": {"warmup": 4}})
