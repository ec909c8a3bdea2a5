"""The learning rate as a pure function of the step.

Schedulers of DeepSpeed and torch keep a step counter, which checkpoints would have to store.
"""

import logging
import math
from typing import Any

from schemas.errors import ConfigError
from trainer.config.train import ScheduleConfig, TrainConfig
from trainer.engine.native_options import native_section, peak_lr

_NEED_THE_END = ("WarmupDecayLR", "WarmupCosineLR")
"""DeepSpeed schedulers that require the total number of steps."""


def num_warmup_steps(schedule: ScheduleConfig, num_steps: int) -> int:
    """Steps of the linear warm-up, at most ``num_steps``."""
    steps = schedule.warmup_steps or round(schedule.warmup_ratio * num_steps)
    return min(steps, num_steps)


def lr_factor(schedule: ScheduleConfig, step: int, num_steps: int) -> float:
    """Factor on the peak learning rate.

    Args:
        step: counted from 0.
        num_steps: steps of the run.

    Returns:
        (step + 1) / W during a warm-up of W steps; then a half cosine or a line from 1 to
        ``min_lr_ratio`` at the last step; "constant" stays at 1.
    """
    warmup = num_warmup_steps(schedule, num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.kind == "constant":
        return 1.0
    # The peak is the last step of the warm-up, or the first step without one.
    peak = max(warmup - 1, 0)
    done = min((step - peak) / max(num_steps - 1 - peak, 1), 1.0)
    falling = (1.0 - done) if schedule.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * falling


class LearningRate:
    """The learning rate of a run, by step."""

    def __init__(self, config: TrainConfig, num_steps: int) -> None:
        """
        Raises:
            ConfigError: DeepSpeed's scheduler refuses its parameters.
        """
        self._schedule, self._num_steps = config.schedule, num_steps
        self._peak = peak_lr(config)
        section = native_section(config, "scheduler")
        self._native = _NativeSchedule(section, self._peak, num_steps) if section else None

    def __call__(self, step: int) -> float:
        """The learning rate of a step, counted from 1."""
        if self._native is not None:
            return self._native(step - 1)
        return self._peak * lr_factor(self._schedule, step - 1, self._num_steps)


class _NativeSchedule:
    """A DeepSpeed scheduler as a function of the step."""

    def __init__(self, section: dict[str, Any], peak: float, num_steps: int) -> None:
        import torch
        from deepspeed.runtime import lr_schedules

        params = dict(section.get("params", {}))
        if section["type"] in _NEED_THE_END and params.get("total_num_steps", "auto") == "auto":
            params["total_num_steps"] = num_steps
        # The scheduler writes its value into an optimizer; this one only receives it.
        self._optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
        logger = logging.getLogger("DeepSpeed")
        level = logger.level
        logger.setLevel(logging.ERROR)  # they warn when queried before their first step
        try:
            self._scheduler = getattr(lr_schedules, section["type"])(self._optimizer, **params)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"deepspeed.native.scheduler.params: {error}") from error
        finally:
            logger.setLevel(level)
        self._first = float(self._optimizer.param_groups[0]["lr"])

    def __call__(self, done: int) -> float:
        """Learning rate after ``done`` steps; DeepSpeed steps schedulers after the optimizer."""
        if not done:
            return self._first
        self._scheduler.step(done - 1)
        return float(self._optimizer.param_groups[0]["lr"])
