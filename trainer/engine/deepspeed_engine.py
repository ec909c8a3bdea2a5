"""Builds the DeepSpeed engine around a student; also holds workarounds for DeepSpeed.

DeepSpeed is imported inside functions because ``DS_ACCELERATOR`` must be set first.
"""

import logging
import os
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from schemas.errors import ConfigError
from trainer.config.train import OptimizerConfig, TrainConfig
from trainer.engine.deepspeed_config import build_deepspeed_config
from trainer.engine.native_options import native_section
from trainer.student.build import StudentWithHead


def prepare_process(config: TrainConfig) -> None:
    """Configures the worker process; call it before creating any tensor."""
    if not config.ray.use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    # Ray sets OMP_NUM_THREADS, but possibly after torch has read it.
    torch.set_num_threads(config.ray.cpus_per_worker)
    torch.manual_seed(config.data.seed + dist.get_rank())  # dropout differs between ranks
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def build_engine(student: StudentWithHead, config: TrainConfig) -> Any:
    """Wraps a student on the CPU for training. Collective.

    Initially every rank holds the full student in host memory, even under ZeRO-3.
    """
    import deepspeed

    _disable_compiled_ops(deepspeed)
    _disable_initial_step()
    if config.deepspeed.precision == "fp32":
        _train_in_float32(student)
    num_parameters = sum(parameter.numel() for parameter in student.parameters())
    is_frozen = any(not parameter.requires_grad for parameter in student.parameters())
    native = native_section(config, "optimizer")
    optimizer = None if native else build_optimizer(student, config.optimizer, config.ray.use_gpu)
    try:
        engine, *_ = deepspeed.initialize(
            model=student,
            optimizer=optimizer,
            model_parameters=_parameter_groups(student, {}) if native else None,
            config=build_deepspeed_config(config, num_parameters, dist.get_world_size()),
            dist_init_required=False,
        )
    except TypeError as error:
        if not native:
            raise
        raise ConfigError(f"deepspeed.native.optimizer.params: {error}") from error
    if is_frozen:
        _exclude_frozen_weights(engine)
    return engine


def _train_in_float32(student: nn.Module) -> None:
    """Converts trained weights to float32; frozen ones keep their dtype.

    DeepSpeed keeps float32 master weights only in bf16 mode. Otherwise it would train bfloat16
    weights directly and lose every update below half a percent of a weight.
    """
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _without_frozen(
    module: nn.Module, state: dict[str, Any], prefix: str, _: dict[str, Any]
) -> None:
    """Removes frozen weights from a state dict; DeepSpeed misses tied weights' second names."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(prefix + name, None)


def _exclude_frozen_weights(engine: Any) -> None:
    """Leaves frozen weights out of checkpoints.

    On resume they are loaded from the configured source; `trainer.student.lora.base_digest` detects
    changes.
    """
    engine.module.register_state_dict_post_hook(_without_frozen)
    engine.save_checkpoint = partial(engine.save_checkpoint, exclude_frozen_parameters=True)
    engine.load_checkpoint = partial(engine.load_checkpoint, load_module_strict=False)


def _parameter_groups(model: nn.Module, decay: dict[str, float]) -> list[dict[str, Any]]:
    """Groups trained parameters: matrices with the options `decay`; norms and biases undecayed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2], **decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig, fused: bool) -> torch.optim.AdamW:
    """Builds AdamW with two groups: matrices, which decay, and norms and biases, which do not."""
    return torch.optim.AdamW(
        _parameter_groups(model, {"weight_decay": config.weight_decay}),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=fused,
    )


def gradient_norm(engine: Any) -> float | None:
    """Global norm of the reduced gradients, where DeepSpeed does not compute it.

    Call it between the last ``backward`` and ``step``. Returns None where the engine knows the norm
    after its step: always except in float32 without ZeRO, which uses torch's own optimizer.
    """
    if not isinstance(engine.optimizer, torch.optim.Optimizer):
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def _disable_compiled_ops(deepspeed: Any) -> None:
    """Keeps DeepSpeed from compiling a shared-memory kernel that only inference uses.

    Remove when ``deepspeed.comm`` no longer builds ``deepspeed_shm_comm`` at every start on CPU.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _disable_initial_step() -> None:
    """Keeps bf16 without ZeRO from starting with an optimizer step on zero gradients.

    DeepSpeed 0.19 does this to allocate optimizer state. The step decays float32 master weights
    once and leaves Adam's step count one ahead; the first real step allocates the state anyway, as
    with ZeRO. Remove when these optimizers no longer step during construction.
    """
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    for wrapper in (FP16_Optimizer, FP16_UnfusedOptimizer):
        wrapper.initialize_optimizer_states = lambda _: None
