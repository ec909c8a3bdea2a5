"""The learning rate as a pure function of the step.

DeepSpeed's and torch's schedulers keep a counter of their own, which is one thing more to save and
to bring back; a function of the step needs nothing.
"""

import math

from trainer.config import ScheduleConfig


def num_warmup_steps(schedule: ScheduleConfig, num_steps: int) -> int:
    """Steps of the linear warm-up; at most all of them."""
    steps = schedule.warmup_steps or round(schedule.warmup_ratio * num_steps)
    return min(steps, num_steps)


def lr_factor(schedule: ScheduleConfig, step: int, num_steps: int) -> float:
    """Factor on the peak learning rate.

    Args:
        step: number of the step, counted from 0, whose update it is for.
        num_steps: steps of the whole run.

    Returns:
        (step + 1) / W in a warm-up of W steps. After it, 1 falls to ``min_lr_ratio``, which the
        last step has, along half a cosine or a line; "constant" stays at 1.
    """
    warmup = num_warmup_steps(schedule, num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.kind == "constant":
        return 1.0
    # The last step of the warm-up is the peak; without one, the first step is.
    peak = max(warmup - 1, 0)
    done = min((step - peak) / max(num_steps - 1 - peak, 1), 1.0)
    falling = (1.0 - done) if schedule.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * falling
