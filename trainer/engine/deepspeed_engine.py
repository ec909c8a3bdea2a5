"""The DeepSpeed engine around a student. Imported in workers only: it imports DeepSpeed.

``DS_ACCELERATOR`` must be set before that import, so it happens inside the functions here.
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
    """Settings of the worker's process, before any tensor is made."""
    if not config.ray.use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    # Ray sets OMP_NUM_THREADS, but torch may have been imported by then.
    torch.set_num_threads(config.ray.cpus_per_worker)
    torch.manual_seed(config.data.seed + dist.get_rank())  # dropout differs between ranks
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def build_engine(student: StudentWithHead, config: TrainConfig) -> Any:
    """Wraps a student, which is on the CPU, for training. Collective.

    Every rank builds the whole student in its own memory, also under ZeRO-3, which then splits it.
    """
    import deepspeed

    _no_compiled_ops(deepspeed)
    _no_step_before_the_first()
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
            model_parameters=_native_groups(student) if native else None,
            config=build_deepspeed_config(config, num_parameters, dist.get_world_size()),
            dist_init_required=False,
        )
    except TypeError as error:
        if not native:
            raise
        raise ConfigError(f"deepspeed.native.optimizer.params: {error}") from error
    if is_frozen:
        _keep_only_what_is_trained(engine)
    return engine


def _train_in_float32(student: nn.Module) -> None:
    """Widens what is trained; what is frozen stays as it was built.

    DeepSpeed keeps float32 masters in its bf16 mode only. Without it, it would train bfloat16
    weights as they are, and lose every update below half a percent of a weight.
    """
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _without_frozen(
    module: nn.Module, state: dict[str, Any], prefix: str, _: dict[str, Any]
) -> None:
    """Takes frozen weights out of a state dict; DeepSpeed leaves the second name of tied ones."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(prefix + name, None)


def _keep_only_what_is_trained(engine: Any) -> None:
    """Leaves frozen weights out of checkpoints.

    They are built again from where the configuration says; `student.lora.base_digest` proves
    that it is the same place.
    """
    engine.module.register_state_dict_post_hook(_without_frozen)
    engine.save_checkpoint = partial(engine.save_checkpoint, exclude_frozen_parameters=True)
    engine.load_checkpoint = partial(engine.load_checkpoint, load_module_strict=False)


def _native_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer that DeepSpeed makes: norms and biases do not decay."""
    decaying, plain = _groups(model)
    groups: list[dict[str, Any]] = [
        {"params": decaying},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What is trained: matrices, and norms and biases."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]


def build_optimizer(model: nn.Module, config: OptimizerConfig, fused: bool) -> torch.optim.AdamW:
    """AdamW in two groups: matrices, which decay, and norms and biases, which do not."""
    decaying, plain = _groups(model)
    groups = [
        {"params": decaying, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=fused,
    )


def gradient_norm(engine: Any) -> float | None:
    """Global norm of the reduced gradients, where DeepSpeed computes none itself.

    To be called between the last ``backward`` and ``step``. None where the engine knows the norm
    after its step: everywhere but in float32 without ZeRO, whose optimizer is torch's own.
    """
    if not isinstance(engine.optimizer, torch.optim.Optimizer):
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def _no_compiled_ops(deepspeed: Any) -> None:
    """Keeps DeepSpeed from compiling a shared-memory kernel that only inference uses.

    Can go when ``deepspeed.comm`` no longer builds ``deepspeed_shm_comm`` on every start on CPU.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _no_step_before_the_first() -> None:
    """Keeps bf16 without ZeRO from starting with an optimizer step over gradients of zero.

    DeepSpeed 0.19 takes it to allocate the optimizer's state. It decays every float32 master once
    and puts Adam's count of steps one ahead for good; state is made at the first real step anyway,
    as with ZeRO. Can go when these optimizers no longer step while they are built.
    """
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    for wrapper in (FP16_Optimizer, FP16_UnfusedOptimizer):
        wrapper.initialize_optimizer_states = lambda _: None
