"""Loads a checkpoint on any number of workers.

ZeRO splits the optimizer's state over the ranks. If the number of ranks is unchanged, each rank
loads its own part. Otherwise the checkpoint is first converted, once, to DeepSpeed's universal form
(one file per state and parameter), in ``RUN/checkpoints/universal_<checkpoint>/`` or next to a
node's download from an object store. Without ZeRO every rank has the full state, and any number of
ranks loads the same file.

The universal form lacks part of the state. Hyperparameters of the optimizer's groups come from the
configuration (under stage 3 DeepSpeed gives all groups those of the first). Frozen parameters and
buffers come from the checkpoint's model file or, for parameters under stage 3, from the student's
source.

**Random numbers** (dropout): on the same number of ranks each rank resumes its own stream, so the
run is bitwise identical. On another number, new streams are seeded from seed, step and rank.
Without dropout nothing in training is random.
"""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError

from schemas.errors import ConfigError
from trainer.checkpoints.store import (
    MANIFEST,
    UNIVERSAL_PREFIX,
    CheckpointManifest,
    describe,
    find_damage,
)
from trainer.engine.universal_checkpoint import to_universal

TWO_MOMENTS = frozenset({"adam", "adamw", "lamb"})
"""Optimizers whose state per parameter is a step and two moments."""


def load_checkpoint(
    engine: Any, folder: Path, manifest: CheckpointManifest, is_leader: bool
) -> None:
    """Restores weights, optimizer and random states. Collective.

    Args:
        engine: the DeepSpeed engine, newly built.
        folder: the verified checkpoint on this machine.
        is_leader: whether this rank converts, among those that see the same folder.

    Raises:
        ConfigError: the number of workers changed, and the universal form cannot store this
            optimizer's state.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    groups = [_hyperparameters(group) for group in engine.optimizer.param_groups]
    if manifest.world_size == world_size or engine.zero_optimization_stage() == 0:
        engine.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)
    else:
        check_universal(engine.optimizer_name(), manifest.world_size)
        _load_universal(engine, _universal_copy(folder, manifest, is_leader))
    # Hyperparameters come from the configuration, not the checkpoint, since they may change.
    for group, hyperparameters in zip(engine.optimizer.param_groups, groups, strict=True):
        group.update(hyperparameters)
    if manifest.world_size == world_size:
        _set_random_state(torch.load(folder / f"random_state_{rank}.pt"))
    else:
        progress = manifest.progress
        torch.manual_seed(_stream(progress.loader.seed, progress.step, rank))


def check_universal(optimizer: str, saved_by: int) -> None:
    """Refuses optimizers without the two moments of Adam, the only state DeepSpeed converts.

    Args:
        optimizer: its name, in upper or lower case.
        saved_by: number of workers that saved the checkpoint.

    Raises:
        ConfigError: the optimizer has other state.
    """
    if optimizer.lower() not in TWO_MOMENTS:
        raise ConfigError(
            f"a ZeRO checkpoint of {saved_by} workers cannot be loaded on another number: its "
            f"optimizer is {optimizer}, and DeepSpeed converts only "
            f"{', '.join(sorted(TWO_MOMENTS))}; set ray.num_workers = {saved_by}"
        )


def _load_universal(engine: Any, folder: Path) -> None:
    # Set for this load only: in DeepSpeed's configuration the flag would apply to every load.
    engine._config.load_universal_checkpoint = True
    try:
        engine.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)
    finally:
        engine._config.load_universal_checkpoint = False
    _separate_step_counts(engine.optimizer.optimizer)
    _load_untrained(engine, folder)


def _separate_step_counts(optimizer: torch.optim.Optimizer) -> None:
    """Gives each parameter's state its own step count.

    Under stage 3, DeepSpeed 0.19 shares one tensor between all states, which torch then increments
    once per group in every step. Remove when a run with two groups keeps its losses without it.
    """
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def _load_untrained(engine: Any, folder: Path) -> None:
    """Loads frozen parameters and buffers, which DeepSpeed leaves as they were built.

    The frozen base of adapters is in no checkpoint; `trainer.student.lora.check_base` has compared
    its digest.
    """
    module = engine.module
    loaded = {
        name
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if parameter.requires_grad or hasattr(parameter, "ds_id")
    }
    missing = module.state_dict().keys() - loaded
    if not missing:
        return
    path = sorted(folder.glob("*_model_states.pt"))[0]
    # weights_only=False: DeepSpeed pickles more than tensors; the file's hash was verified.
    saved = torch.load(path, map_location="cpu", weights_only=False)["module"]
    module.load_state_dict({name: saved[name] for name in missing & saved.keys()}, strict=False)


def _universal_copy(folder: Path, manifest: CheckpointManifest, is_leader: bool) -> Path:
    """Folder of the checkpoint's universal form, converted unless it exists. Collective."""
    copy = folder.with_name(f"{UNIVERSAL_PREFIX}{folder.name}")
    if is_leader and not _is_complete(copy):
        # Convert under a temporary name and rename, so that a killed conversion leaves no copy.
        partial = folder.with_name(f".{copy.name}.{os.getpid()}")
        for leftover in folder.parent.glob(f".{copy.name}.*"):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.rmtree(copy, ignore_errors=True)
        to_universal(folder, partial)
        paths = sorted(path for path in partial.rglob("*") if path.is_file())
        converted = manifest.model_copy(update={"files": [describe(partial, p) for p in paths]})
        # No fsync: after a power cut the hashes reveal missing data, and conversion is repeated.
        (partial / MANIFEST).write_text(converted.model_dump_json(indent=2))
        partial.rename(copy)
    dist.barrier()
    return copy


def _is_complete(copy: Path) -> bool:
    try:
        manifest = CheckpointManifest.model_validate_json((copy / MANIFEST).read_bytes())
    except (FileNotFoundError, ValidationError):
        return False
    return not any(find_damage(copy, file) for file in manifest.files)


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _stream(seed: int, step: int, rank: int) -> int:
    """A 63-bit seed for torch from integers of any size."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
