"""Checkpoints of a run: trusted only when complete and unharmed.

``RUN/checkpoints/step_<n>/`` holds what DeepSpeed saves for every rank, the random states of the
ranks, and ``manifest.json``. The manifest is written last and atomically, with size and hash of
every other file, so a process that dies at any moment leaves no checkpoint that is trusted by
mistake. All functions here are collective: every rank calls them and hashes its share of the files.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field, ValidationError

from schemas.config import StrictModel
from schemas.errors import ConfigError
from trainer.plan import LoaderState
from trainer.run_folder import sync_folder, write_atomic

MANIFEST = "manifest.json"


class TrainProgress(StrictModel):
    """How far a run is, apart from weights and optimizer.

    Attributes:
        step: global steps done.
        tokens: tokens of the rows trained on.
        labels: labelled positions among them.
        pending: sums since the last line of metrics.jsonl, by name.
        recent: what the guard measures the next steps against.
    """

    step: int
    loader: LoaderState
    tokens: int
    labels: int
    final_loss: float
    pending: dict[str, float]
    recent: dict[str, list[float]] = Field(default_factory=dict)


class CheckpointFile(StrictModel):
    """One file, with its path in the checkpoint's folder."""

    path: str
    size_bytes: int
    sha256: str


class CheckpointManifest(StrictModel):
    """What a checkpoint holds."""

    world_size: int
    label_sets: list[str]
    progress: TrainProgress
    files: list[CheckpointFile]


def save_checkpoint(
    engine: Any, root: Path, progress: TrainProgress, label_sets: list[str], keep: int
) -> None:
    """Saves the run as it is now, and removes all but the newest ``keep`` checkpoints.

    Args:
        engine: the DeepSpeed engine.
        root: ``RUN/checkpoints``.
        label_sets: fingerprints of the label sets that are trained on.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    folder = root / f"step_{progress.step}"
    if rank == 0:
        _remove(folder)  # what a killed process may have left
    dist.barrier()
    engine.save_checkpoint(str(root), tag=folder.name, save_latest=False)
    torch.save(_random_state(), folder / f"random_state_{rank}.pt")
    dist.barrier()
    files = _gathered(
        [_describe(folder, path) for path in _share(_files(folder), rank, world_size)]
    )
    if rank == 0:
        manifest = CheckpointManifest(
            world_size=world_size,
            label_sets=label_sets,
            progress=progress,
            files=sorted(files, key=lambda file: file.path),
        )
        write_atomic(folder / MANIFEST, manifest.model_dump_json(indent=2).encode())
        for _, old in _by_step(root)[keep:]:
            _remove(old)
    dist.barrier()


def find_checkpoint(root: Path) -> tuple[Path | None, CheckpointManifest | None, list[str]]:
    """The newest checkpoint that verifies, byte by byte.

    Returns:
        Its folder and manifest, or None twice; and a line for each newer one that was passed over.
    """
    passed_over: list[str] = []
    dist.barrier()
    for _, folder in _broadcast(_by_step(root)):
        manifest, problem = _verify(folder)
        if problem is None:
            return folder, manifest, passed_over
        passed_over.append(f"checkpoint {folder} is passed over: {problem}")
    return None, None, passed_over


def load_checkpoint(engine: Any, folder: Path, manifest: CheckpointManifest) -> None:
    """Brings weights, optimizer and random states back.

    Raises:
        ConfigError: the checkpoint was saved by another number of workers.
    """
    world_size = dist.get_world_size()
    if manifest.world_size != world_size:
        raise ConfigError(
            f"checkpoint {folder} was saved by {manifest.world_size} workers, but "
            f"ray.num_workers = {world_size}; go on with ray.num_workers={manifest.world_size}, "
            "or choose a new run folder: run=..."
        )
    groups = [_hyperparameters(group) for group in engine.optimizer.param_groups]
    engine.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)
    # The configuration says what they are, whatever was saved.
    for group, hyperparameters in zip(engine.optimizer.param_groups, groups, strict=True):
        group.update(hyperparameters)
    _set_random_state(torch.load(folder / f"random_state_{dist.get_rank()}.pt"))


def _verify(folder: Path) -> tuple[CheckpointManifest | None, str | None]:
    try:
        manifest = CheckpointManifest.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        return None, "it was not finished"
    except (ValidationError, json.JSONDecodeError):
        return None, f"its {MANIFEST} is not readable"
    problems = []
    for file in _share(manifest.files, dist.get_rank(), dist.get_world_size()):
        path = folder / file.path
        if not path.exists():
            problems.append(f"{file.path} is missing")
        elif path.stat().st_size != file.size_bytes:
            problems.append(
                f"{file.path} has {path.stat().st_size} bytes, expected {file.size_bytes}"
            )
        elif _sha256(path) != file.sha256:
            problems.append(f"{file.path} is damaged: its bytes do not match their hash")
    problems = _gathered(problems)
    return manifest, problems[0] if problems else None


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _by_step(root: Path) -> list[tuple[int, Path]]:
    """Checkpoint folders, newest first, trusted or not."""
    folders = [path for path in root.glob("step_*") if path.name[5:].isdecimal()]
    return sorted(((int(path.name[5:]), path) for path in folders), reverse=True)


def _remove(folder: Path) -> None:
    """Removes a checkpoint, its manifest first, so that half a checkpoint is never trusted."""
    if folder.exists():
        (folder / MANIFEST).unlink(missing_ok=True)
        sync_folder(folder)
        shutil.rmtree(folder)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _share(items: list[Any], rank: int, world_size: int) -> list[Any]:
    return items[rank::world_size]


def _describe(folder: Path, path: Path) -> CheckpointFile:
    return CheckpointFile(
        path=path.relative_to(folder).as_posix(),
        size_bytes=path.stat().st_size,
        sha256=_sha256(path),
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _gathered(items: list[Any]) -> list[Any]:
    """The items of all ranks, on all ranks, in the order of the ranks."""
    per_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(per_rank, items)
    return [item for part in per_rank for item in part]


def _broadcast(value: Any) -> Any:
    """Rank 0's value on all ranks."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
