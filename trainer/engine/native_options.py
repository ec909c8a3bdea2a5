"""DeepSpeed's own optimizers and schedulers: ``deepspeed.native.optimizer`` and ``.scheduler``.

Each replaces one of our tables, ``[optimizer]`` or ``[schedule]``, which must then be absent:
setting a value twice is an error.
"""

from typing import Any

from pydantic import BaseModel

from schemas.errors import ConfigError
from trainer.config.train import OptimizerConfig, ScheduleConfig, TrainConfig

OPTIMIZERS = (
    "Adam", "AdamW", "Adagrad", "Lamb", "Lion", "SGD", "RMSprop", "NAdam", "RAdam",
)  # fmt: skip
"""DeepSpeed optimizers that need only a name. Its 1-bit optimizers compress gradients, which would
make token means inexact; its Muon needs annotated parameters."""

SCHEDULERS = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "LRRangeTest", "OneCycle")
"""All of DeepSpeed's schedulers; each is a pure function of the step."""

_KEYS = frozenset({"type", "params"})


def native_section(config: TrainConfig, name: str) -> dict[str, Any]:
    """``deepspeed.native.optimizer`` or ``.scheduler``; empty if absent."""
    return config.deepspeed.native.get(name) or {}


def peak_lr(config: TrainConfig) -> float:
    """The learning rate that schedules multiply: the native optimizer's, or ours."""
    section = native_section(config, "optimizer")
    return float(section["params"]["lr"]) if section else config.optimizer.lr


def check_native_optimizer(config: TrainConfig) -> None:
    """Refuses native sections that are unsupported or contradict one of our tables.

    Raises:
        ConfigError: names both keys.
    """
    optimizer = native_section(config, "optimizer")
    if optimizer:
        _check_section("optimizer", optimizer, OPTIMIZERS)
        _refuse_both("optimizer", "[optimizer]", config.optimizer, OptimizerConfig())
        lr = optimizer.get("params", {}).get("lr")
        if isinstance(lr, bool) or not isinstance(lr, int | float) or lr <= 0:
            raise ConfigError(
                f"deepspeed.native.optimizer.params.lr = {lr!r}; set the peak learning rate, a "
                "positive number"
            )
    scheduler = native_section(config, "scheduler")
    if scheduler:
        _check_section("scheduler", scheduler, SCHEDULERS)
        _refuse_both("scheduler", "[schedule]", config.schedule, ScheduleConfig())
        # cycle_momentum defaults to true and would change the optimizer's betas.
        if scheduler["type"] == "OneCycle" and scheduler.get("params", {}).get(
            "cycle_momentum", True
        ):
            raise ConfigError(
                "deepspeed.native.scheduler: OneCycle also changes the optimizer's momentum; set "
                "deepspeed.native.scheduler.params.cycle_momentum = false"
            )


def _check_section(name: str, section: Any, known: tuple[str, ...]) -> None:
    if not isinstance(section, dict) or not section.keys() <= _KEYS:
        found = sorted(section.keys() - _KEYS) if isinstance(section, dict) else repr(section)
        raise ConfigError(
            f"deepspeed.native.{name}: found {found}; expected a table of type and params"
        )
    if section.get("type") not in known:
        raise ConfigError(
            f"deepspeed.native.{name}.type = {section.get('type')!r} is not supported here; "
            f"expected one of {', '.join(known)}"
        )


def _refuse_both(name: str, table: str, ours: BaseModel, default: BaseModel) -> None:
    changed = [
        key for key in type(ours).model_fields if getattr(ours, key) != getattr(default, key)
    ]
    if changed:
        raise ConfigError(
            f"deepspeed.native.{name} replaces {table}, but {table} sets {', '.join(changed)}; "
            "remove one of them"
        )
