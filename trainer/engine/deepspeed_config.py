"""The only module that builds the DeepSpeed configuration.

DeepSpeed 0.19 changed several defaults (gradient clipping is now 1.0, bfloat16 steps with a
non-finite gradient are silently skipped), and gradients accumulate in the model's dtype. So every
value that affects the result is set here: *fixed*, if another part of the configuration determines
it, or as a *default* that ``deepspeed.native`` may override.
"""

from collections.abc import Mapping
from typing import Any

from schemas.errors import ConfigError
from trainer.config.train import TrainConfig
from trainer.data.row_order import num_micro_batches
from trainer.engine.native_options import check_native_optimizer
from trainer.run_folder import flatten

_OURS_INSTEAD = {
    "amp": 'deepspeed.precision = "bf16"',
    "bfloat16": 'deepspeed.precision = "bf16"',
    "data_efficiency": "[data]",
    "curriculum_learning": "[data]",
    "checkpoint.load_universal": "a new run folder",
}
"""Native sections that duplicate a feature of this trainer, and what to use instead."""

_DETERMINED_BY = {
    "train_batch_size": "data.sequences_per_step",
    "train_micro_batch_size_per_gpu": "data.micro_batch_size",
    "gradient_accumulation_steps": (
        "data.sequences_per_step, data.micro_batch_size and ray.num_workers"
    ),
    "gradient_clipping": "deepspeed.gradient_clipping",
    "zero_optimization.stage": "deepspeed.zero_stage",
    "bf16.enabled": "deepspeed.precision",
    "fp16.enabled": "deepspeed.precision",
    "data_types.grad_accum_dtype": "deepspeed.precision and deepspeed.zero_stage",
}
"""Our keys that determine a native key; other fixed keys follow from how the trainer works."""


def build_deepspeed_config(
    config: TrainConfig, num_parameters: int, world_size: int
) -> dict[str, Any]:
    """Builds the complete DeepSpeed configuration of a run.

    Args:
        config: the training run.
        num_parameters: parameters of the student, which bounds bucket sizes: DeepSpeed would
            allocate buckets of 5e8 elements (2 GB) for any model.
        world_size: number of data-parallel ranks.

    Raises:
        ConfigError: ``deepspeed.native`` contradicts another key; names both.
    """
    native = dict(config.deepspeed.native)
    check_native_optimizer(config)
    native.pop("scheduler", None)  # trainer.engine.learning_rate evaluates it
    fixed = _fixed(config, world_size)
    given = {key: value for key, value in flatten(native).items() if value not in (None, {})}
    for key, replacement in _OURS_INSTEAD.items():
        if any(f"{name}.".startswith(f"{key}.") for name in given):
            raise ConfigError(
                f"deepspeed.native.{key} is set, but the trainer does this itself; use "
                f"{replacement} instead"
            )
    for key, ours in flatten(fixed).items():
        theirs = given.get(key, "auto")
        if theirs not in ("auto", ours):
            source = _DETERMINED_BY.get(key, "the way this trainer computes exact token means")
            raise ConfigError(
                f"deepspeed.native.{key} = {theirs!r} contradicts {ours!r}, which follows from "
                f"{source}; remove one of them"
            )
    return _merged(_merged(_defaults(config, num_parameters), native), fixed)


def _fixed(config: TrainConfig, world_size: int) -> dict[str, Any]:
    micro_batches = num_micro_batches(config.data, world_size)
    micro_batch_size = config.data.micro_batch_size
    bf16 = config.deepspeed.precision == "bf16"
    # Stage 0 has no separate gradient buffer: it accumulates in the model's dtype.
    grad_accum_dtype = "bf16" if bf16 and config.deepspeed.zero_stage == 0 else "fp32"
    return {
        "train_batch_size": micro_batch_size * micro_batches * world_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "managed_gradient_accumulation": True,
        # The loss is already divided by the global step's labels, so ranks need a plain mean.
        "gradient_allreduce_op": "mean",
        "prescale_gradients": False,
        "gradient_clipping": config.deepspeed.gradient_clipping,
        "zero_optimization": {"stage": config.deepspeed.zero_stage},
        # The trainer stops at a non-finite gradient; DeepSpeed would silently skip the step.
        "bf16": {"enabled": bf16, "check_grad_overflow": False},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": grad_accum_dtype},
    }


def _defaults(config: TrainConfig, num_parameters: int) -> dict[str, Any]:
    bucket = max(num_parameters, 1 << 16)
    return {
        "zero_optimization": {
            "reduce_bucket_size": min(bucket, 500_000_000),
            "allgather_bucket_size": min(bucket, 500_000_000),
            "stage3_prefetch_bucket_size": min(bucket, 50_000_000),
            "overlap_comm": config.ray.use_gpu,
        },
        # torch's AdamW works with every stage and offload, and needs no compiler on the workers.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 31,  # never
        "wall_clock_breakdown": False,
        # Our checkpoints have their own names; DeepSpeed's tag is constant.
        "checkpoint": {"tag_validation": "Ignore"},
    }


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            merged[key] = _merged(old, value)
        else:
            merged[key] = value
    return merged
