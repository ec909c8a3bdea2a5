"""Lists, verifies, downloads and deletes the checkpoints of a run.

``RUN/checkpoints/step_<n>-<attempt>/`` holds the files that DeepSpeed saves on every rank, the
ranks' random states, and ``manifest.json``. The manifest lists size and SHA-256 of every other file
and is written last, atomically; a folder without it is an unfinished save. Each start of the
workers is an attempt with its own name and writes only to folders of that name. So workers that
outlive their driver cannot touch the next attempt's files, and a checkpoint they finish is valid.

`trainer.checkpoints.writer` saves checkpoints, `trainer.checkpoints.restore` loads them.
"""

import contextlib
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist
from pydantic import ValidationError

from schemas.config import StrictModel
from schemas.storage.local_files import digest_stream
from schemas.storage.store import Store
from trainer.checkpoints.train_progress import TrainProgress
from trainer.config.train import CheckpointConfig
from trainer.engine.collectives import from_rank_0, gathered, share

MANIFEST = "manifest.json"
FOLDER = "checkpoints"
UNIVERSAL_PREFIX = "universal_"
DOWNLOADS = 4
"""Files that one node downloads in parallel."""


class CheckpointFile(StrictModel):
    """One file of a checkpoint; ``path`` is relative to its folder."""

    path: str
    size_bytes: int
    sha256: str


class CheckpointManifest(StrictModel):
    """manifest.json: the files of a checkpoint and the progress of the run."""

    world_size: int
    label_sets: list[str]
    progress: TrainProgress
    files: list[CheckpointFile]


def checkpoint_name(step: int, attempt: str) -> str:
    """Name of the folder that an attempt saves a step to."""
    return f"step_{step}-{attempt}"


def list_checkpoints(store: Store) -> list[tuple[int, str]]:
    """Lists step and name of every checkpoint folder, newest first, finished or not."""
    found = []
    for rel in store.folders(FOLDER):
        name = rel.rpartition("/")[2]
        step = name.removeprefix("step_").partition("-")[0]
        if name.startswith("step_") and step.isdecimal():
            found.append((int(step), name))
    return sorted(found, reverse=True)


def read_manifest(store: Store, name: str) -> tuple[CheckpointManifest | None, str]:
    """Returns the manifest of a checkpoint, or None and the reason."""
    try:
        data = store.read_bytes(f"{FOLDER}/{name}/{MANIFEST}")
        return CheckpointManifest.model_validate_json(data), ""
    except FileNotFoundError:
        return None, "it is unfinished"
    except ValidationError:
        return None, f"its {MANIFEST} is unreadable"


def find_checkpoint(
    store: Store, cache: Path, is_node_leader: bool
) -> tuple[Path | None, CheckpointManifest | None, list[str]]:
    """Finds the newest checkpoint whose files all match their hashes. Collective.

    On a shared file system each rank hashes some of the files. From an object store one rank per
    node downloads all files and hashes them in transit.

    Args:
        store: the run's folder.
        cache: folder of this node for downloads.
        is_node_leader: whether this rank downloads.

    Returns:
        Its local folder and its manifest, or None and None; and a line for each newer checkpoint
        that was skipped.
    """
    skipped: list[str] = []
    # Only rank 0 lists: nodes may see different listings of a shared file system.
    for _, name in from_rank_0(list_checkpoints(store) if dist.get_rank() == 0 else None):
        manifest, problem = from_rank_0(read_manifest(store, name) if dist.get_rank() == 0 else 0)
        folder = Path(store.path(FOLDER, name)) if store.is_local else cache / name
        if manifest is not None:
            problems = []
            if store.is_local:
                problems = [find_damage(folder, file) for file in share(manifest.files)]
            elif is_node_leader:
                problems = _download(store, name, manifest, folder)
            problem = next(filter(None, gathered(problems)), "")
            if not problem:
                return folder, manifest, skipped
            if is_node_leader and not store.is_local:
                shutil.rmtree(folder, ignore_errors=True)
        skipped.append(f"checkpoint {store.path(FOLDER, name)} is skipped: {problem}")
    return None, None, skipped


@contextlib.contextmanager
def local_checkpoint(
    store: Store, cache: Path, is_node_leader: bool
) -> Iterator[tuple[Path | None, CheckpointManifest | None, list[str]]]:
    """Calls ``find_checkpoint``; deletes the download when the block ends. Collective."""
    try:
        yield find_checkpoint(store, cache, is_node_leader)
        dist.barrier()  # all ranks of a node read the same copy
    finally:
        # Even if this rank failed; other ranks of the node then fail on the missing copy.
        if is_node_leader:
            shutil.rmtree(cache, ignore_errors=True)


def delete_old_checkpoints(
    store: Store, name: str, manifest: CheckpointManifest, config: CheckpointConfig
) -> None:
    """Deletes old checkpoints after checkpoint ``name`` is complete.

    Keeps this one, the newest before it (``keep`` in total), and the ``keep_best`` best.
    """
    step = manifest.progress.step
    before: dict[int, str] = {}
    for old_step, old in list_checkpoints(store):
        if old_step < step and store.exists(f"{FOLDER}/{old}/{MANIFEST}"):
            before.setdefault(old_step, old)  # two attempts may have saved the same step
    kept = {name, *list(before.values())[: config.keep - 1]}
    if config.keep_best:
        kept.update(_best(store, name, manifest, list(before.values()), config))
    # Later steps are deleted too: they were skipped on restart or are unfinished.
    for _, old in list_checkpoints(store):
        if old not in kept:
            delete_checkpoint(store, old)
    for rel in store.folders(FOLDER):
        copy = rel.rpartition("/")[2]
        if copy.startswith(UNIVERSAL_PREFIX) and copy.removeprefix(UNIVERSAL_PREFIX) not in kept:
            store.delete(rel)


def delete_checkpoint(store: Store, name: str) -> None:
    """Deletes a checkpoint, manifest first, so that a partial one never looks valid."""
    store.delete(f"{FOLDER}/{name}/{MANIFEST}")
    store.delete(f"{FOLDER}/{name}")


def find_damage(folder: Path, file: CheckpointFile) -> str:
    """Compares a local file with its manifest entry; returns "" if it matches."""
    try:
        return _difference(file, describe(folder, folder / file.path))
    except FileNotFoundError:
        return f"{file.path} is missing"


def describe(folder: Path, path: Path) -> CheckpointFile:
    """Returns size and SHA-256 of a local file."""
    with path.open("rb") as file:
        sha256, size = digest_stream(file)
    rel = path.relative_to(folder).as_posix()
    return CheckpointFile(path=rel, size_bytes=size, sha256=sha256)


def _difference(expected: CheckpointFile, found: CheckpointFile) -> str:
    if found.size_bytes != expected.size_bytes:
        return f"{expected.path} has {found.size_bytes} bytes, expected {expected.size_bytes}"
    if found.sha256 != expected.sha256:
        return f"{expected.path} is damaged: its SHA-256 does not match"
    return ""


def _best(
    store: Store,
    name: str,
    manifest: CheckpointManifest,
    before: list[str],
    config: CheckpointConfig,
) -> list[str]:
    metrics = {name: manifest.progress.metrics}
    for old in before:
        found, _ = read_manifest(store, old)
        metrics[old] = found.progress.metrics if found is not None else {}
    metric = config.best_metric
    values = {key: measured[metric] for key, measured in metrics.items() if metric in measured}
    ranked = sorted(values, key=lambda key: values[key], reverse=config.best_is == "highest")
    return ranked[: config.keep_best]


def _download(store: Store, name: str, manifest: CheckpointManifest, folder: Path) -> list[str]:
    """Copies a checkpoint to this node. Returns each file's damage, "" if intact."""
    shutil.rmtree(folder, ignore_errors=True)

    def one(file: CheckpointFile) -> str:
        path = folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with store.open(f"{FOLDER}/{name}/{file.path}") as source, path.open("wb") as target:
                sha256, size = digest_stream(source, target)
        except FileNotFoundError:
            return f"{file.path} is missing"
        return _difference(file, CheckpointFile(path=file.path, size_bytes=size, sha256=sha256))

    with ThreadPoolExecutor(DOWNLOADS) as pool:
        return list(pool.map(one, manifest.files))
