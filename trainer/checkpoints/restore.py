"""Brings a checkpoint back, on as many workers as there are now.

ZeRO splits the optimizer's state over the ranks. On the number of ranks that saved it, every rank
loads its own part. On another, the checkpoint is first converted, once, into DeepSpeed's universal
form, one file for each state of each parameter, beside it:
``RUN/checkpoints/universal_<checkpoint>/``, or beside the copy that a node has of a checkpoint on
an object store. Without ZeRO every rank holds the whole state, and any number of them loads the
same file.

What the universal form does not hold, and where it comes from instead: hyperparameters of the
optimizer's groups from the configuration (DeepSpeed gives all groups of stage 3 those of the
first); frozen parameters and buffers from the checkpoint's model file, or under stage 3, for
parameters, from the student's own source.

**Random numbers** (dropout): on the same number of ranks every rank goes on with its own stream, so
the run is the same to the bit. On another number there are no streams to go on with; new ones start
from seed, step and rank. Without dropout nothing in training is random.
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
from schemas.storage.local_files import replace_file, sync_folder
from trainer.checkpoints.store import (
    MANIFEST,
    UNIVERSAL_PREFIX,
    CheckpointManifest,
    damage,
    describe,
)
from trainer.engine.universal_checkpoint import to_universal

TWO_MOMENTS = frozenset({"adam", "adamw", "lamb"})
"""Optimizers of which each parameter's state is a step and two moments."""


def load_checkpoint(
    engine: Any, folder: Path, manifest: CheckpointManifest, is_leader: bool
) -> None:
    """Brings weights, optimizer and random states back. Collective.

    Args:
        engine: the DeepSpeed engine, as it was built.
        folder: the checkpoint on this machine, verified.
        is_leader: whether this rank converts, of those that see the same folder.

    Raises:
        ConfigError: the number of workers changed, and the universal form has no place for the
            state of the optimizer.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    groups = [_hyperparameters(group) for group in engine.optimizer.param_groups]
    if manifest.world_size == world_size or engine.zero_optimization_stage() == 0:
        engine.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)
    else:
        check_universal(engine.optimizer_name(), manifest.world_size)
        _load_universal(engine, _universal_copy(folder, manifest, is_leader))
    # The configuration says what they are, whatever was saved.
    for group, hyperparameters in zip(engine.optimizer.param_groups, groups, strict=True):
        group.update(hyperparameters)
    if manifest.world_size == world_size:
        _set_random_state(torch.load(folder / f"random_state_{rank}.pt"))
    else:
        progress = manifest.progress
        torch.manual_seed(_stream(progress.loader.seed, progress.step, rank))


def check_universal(optimizer: str, saved_by: int) -> None:
    """Refuses optimizers whose state is not the two moments of Adam, which DeepSpeed looks for.

    Args:
        optimizer: its name, in any case.
        saved_by: number of workers that saved the checkpoint.

    Raises:
        ConfigError: of such an optimizer.
    """
    if optimizer.lower() not in TWO_MOMENTS:
        raise ConfigError(
            f"a checkpoint that {saved_by} workers saved under ZeRO cannot go on with another "
            f"number, as its optimizer is {optimizer} and DeepSpeed converts only "
            f"{', '.join(sorted(TWO_MOMENTS))}; set ray.num_workers = {saved_by}"
        )


def _load_universal(engine: Any, folder: Path) -> None:
    engine._config.load_universal_checkpoint = True
    try:
        engine.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)
    finally:
        engine._config.load_universal_checkpoint = False
    _separate_step_counts(engine.optimizer.optimizer)
    _load_what_is_not_trained(engine, folder)


def _separate_step_counts(optimizer: torch.optim.Optimizer) -> None:
    """Gives each state a count of its own.

    DeepSpeed 0.19 gives all states of stage 3 one tensor, which torch then counts up once for each
    group in every step. Can go when a run over two groups loses nothing without it.
    """
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def _load_what_is_not_trained(engine: Any, folder: Path) -> None:
    """Frozen parameters and buffers, which DeepSpeed leaves as they were built.

    The frozen base of adapters is in no checkpoint, and was proved to be the one that it was.
    """
    module = engine.module
    loaded = {
        name
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if parameter.requires_grad or hasattr(parameter, "ds_id")
    }
    wanted = module.state_dict().keys() - loaded
    if not wanted:
        return
    path = sorted(folder.glob("*_model_states.pt"))[0]
    saved = torch.load(path, map_location="cpu", weights_only=False)["module"]
    there = {name: saved[name] for name in wanted if name in saved}
    module.load_state_dict(there, strict=False)


def _universal_copy(folder: Path, manifest: CheckpointManifest, is_leader: bool) -> Path:
    """The universal form of a checkpoint, made where it is not there yet. Collective."""
    copy = folder.with_name(f"{UNIVERSAL_PREFIX}{folder.name}")
    if is_leader and not _is_whole(copy):
        partial = folder.with_name(f".{copy.name}.{os.getpid()}")
        for leftover in folder.parent.glob(f".{copy.name}.*"):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.rmtree(copy, ignore_errors=True)
        to_universal(folder, partial)
        paths = sorted(path for path in partial.rglob("*") if path.is_file())
        whole = manifest.model_copy(update={"files": [describe(partial, path) for path in paths]})
        replace_file(partial / MANIFEST, whole.model_dump_json(indent=2).encode())
        partial.rename(copy)
        sync_folder(folder.parent)
    dist.barrier()
    return copy


def _is_whole(copy: Path) -> bool:
    try:
        manifest = CheckpointManifest.model_validate_json((copy / MANIFEST).read_bytes())
    except (FileNotFoundError, ValidationError):
        return False
    return not any(damage(copy, file) for file in manifest.files)


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _stream(seed: int, step: int, rank: int) -> int:
    """A seed for torch, which takes 64 bits, from numbers of any size."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
