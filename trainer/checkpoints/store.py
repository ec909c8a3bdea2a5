"""Checkpoints of a run: which are there, which are trusted, which are kept.

``RUN/checkpoints/step_<n>-<attempt>/`` holds what DeepSpeed saves for every rank, the random states
of the ranks, and ``manifest.json``. The manifest is written last and as a whole, with size and hash
of every other file, so a process that dies at any moment leaves no checkpoint that is trusted by
mistake. Every start of the workers has a name of its own, the attempt, and writes to folders of
that name only: workers that outlive their driver cannot touch what the next ones write, and what
they finish late is a true checkpoint of the same run.

Written by `trainer.checkpoints.writer`, loaded by `trainer.checkpoints.restore`.
"""

import contextlib
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist
from pydantic import Field, ValidationError

from schemas.config import StrictModel
from schemas.storage.local_files import digest_stream
from schemas.storage.store import Store
from trainer.config.train import CheckpointConfig
from trainer.data.row_order import LoaderState
from trainer.engine.collectives import from_rank_0, gathered, share
from trainer.progress import EvalState

MANIFEST = "manifest.json"
FOLDER = "checkpoints"
UNIVERSAL_PREFIX = "universal_"
DOWNLOADS = 4
"""Files that one node downloads at a time."""


class TrainProgress(StrictModel):
    """How far a run is, apart from weights and optimizer.

    Attributes:
        step: global steps done.
        tokens: tokens of the rows trained on.
        labels: labelled positions among them.
        pending: sums since the last line of metrics.jsonl, by name.
        recent: what the guard measures the next steps against.
        metrics: what was measured last, by name: ``loss``, ``ce`` and ``kl`` of the last line of
            metrics.jsonl, and what an evaluation gave. Empty before the first.
        evaluation: where early stopping stands.
        base_digest: of the frozen weights, which checkpoints do not hold; empty: nothing is frozen.
    """

    step: int
    loader: LoaderState
    tokens: int
    labels: int
    final_loss: float
    pending: dict[str, float]
    recent: dict[str, list[float]] = Field(default_factory=dict)
    metrics: dict[str, float] = Field(default_factory=dict)
    evaluation: EvalState = Field(default_factory=EvalState)
    base_digest: str = ""


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


def checkpoint_name(step: int, attempt: str) -> str:
    """Name of the folder that the workers of an attempt save a step to."""
    return f"step_{step}-{attempt}"


def list_checkpoints(store: Store) -> list[tuple[int, str]]:
    """Step and name of every checkpoint folder, newest first, trusted or not."""
    found = []
    for rel in store.folders(FOLDER):
        name = rel.rpartition("/")[2]
        step = name.removeprefix("step_").partition("-")[0]
        if name.startswith("step_") and step.isdecimal():
            found.append((int(step), name))
    return sorted(found, reverse=True)


def read_manifest(store: Store, name: str) -> tuple[CheckpointManifest | None, str]:
    """The manifest of a checkpoint, or None and why there is none."""
    try:
        data = store.read_bytes(f"{FOLDER}/{name}/{MANIFEST}")
        return CheckpointManifest.model_validate_json(data), ""
    except FileNotFoundError:
        return None, "it was not finished"
    except ValidationError:
        return None, f"its {MANIFEST} is not readable"


def find_checkpoint(
    store: Store, cache: Path, is_node_leader: bool
) -> tuple[Path | None, CheckpointManifest | None, list[str]]:
    """The newest checkpoint that verifies, byte by byte. Collective.

    On a file system that all ranks share, each hashes a part of the files where they lie. From any
    other store one rank of every node downloads them, and they are hashed on the way.

    Args:
        store: the run's folder.
        cache: folder of this node for what is downloaded.
        is_node_leader: whether this rank downloads.

    Returns:
        Its folder on this machine and its manifest, or None twice; and a line for each newer one
        that was passed over.
    """
    passed_over: list[str] = []
    for _, name in from_rank_0(list_checkpoints(store) if dist.get_rank() == 0 else None):
        manifest, problem = from_rank_0(read_manifest(store, name) if dist.get_rank() == 0 else 0)
        folder = Path(store.path(FOLDER, name)) if store.is_local else cache / name
        if manifest is not None:
            problems = []
            if store.is_local:
                problems = [damage(folder, file) for file in share(manifest.files)]
            elif is_node_leader:
                problems = _download(store, name, manifest, folder)
            problem = next(filter(None, gathered(problems)), "")
            if not problem:
                return folder, manifest, passed_over
            if is_node_leader and not store.is_local:
                shutil.rmtree(folder, ignore_errors=True)
        passed_over.append(f"checkpoint {store.path(FOLDER, name)} is passed over: {problem}")
    return None, None, passed_over


@contextlib.contextmanager
def checkpoint_at_hand(
    store: Store, cache: Path, is_node_leader: bool
) -> Iterator[tuple[Path | None, CheckpointManifest | None, list[str]]]:
    """``find_checkpoint``, for as long as it is needed: what was downloaded goes away. Collective.

    Where a rank fails in between, the others may find the copy gone and fail as well.
    """
    try:
        yield find_checkpoint(store, cache, is_node_leader)
        dist.barrier()  # the ranks of a node read one copy
    finally:
        if is_node_leader:
            shutil.rmtree(cache, ignore_errors=True)


def keep_only(
    store: Store, name: str, manifest: CheckpointManifest, config: CheckpointConfig
) -> None:
    """Removes the checkpoints that are not to be kept, after one was finished.

    Kept are this one, the newest of those before it up to ``keep`` in all, and the ``keep_best``
    best. What lies after it was passed over when the run went on, or never finished.
    """
    step = manifest.progress.step
    before: dict[int, str] = {}
    for old_step, old in list_checkpoints(store):
        if old_step < step and store.exists(f"{FOLDER}/{old}/{MANIFEST}"):
            before.setdefault(old_step, old)
    kept = {name, *list(before.values())[: config.keep - 1]}
    if config.keep_best:
        kept.update(_best(store, name, manifest, list(before.values()), config))
    for _, old in list_checkpoints(store):
        if old not in kept:
            remove_checkpoint(store, old)
    for rel in store.folders(FOLDER):
        copy = rel.rpartition("/")[2]
        if copy.startswith(UNIVERSAL_PREFIX) and copy.removeprefix(UNIVERSAL_PREFIX) not in kept:
            store.delete(rel)


def remove_checkpoint(store: Store, name: str) -> None:
    """Removes a checkpoint, its manifest first, so that half a checkpoint is never trusted."""
    store.delete(f"{FOLDER}/{name}/{MANIFEST}")
    store.delete(f"{FOLDER}/{name}")


def damage(folder: Path, file: CheckpointFile) -> str:
    """What is wrong with a file on this machine; empty where nothing is."""
    try:
        size = (folder / file.path).stat().st_size
    except FileNotFoundError:
        return f"{file.path} is missing"
    if size != file.size_bytes:
        return f"{file.path} has {size} bytes, expected {file.size_bytes}"
    return _compare(file, describe(folder, folder / file.path))


def describe(folder: Path, path: Path) -> CheckpointFile:
    """Size and hash of a file on this machine."""
    with path.open("rb") as file:
        sha256, size = digest_stream(file)
    rel = path.relative_to(folder).as_posix()
    return CheckpointFile(path=rel, size_bytes=size, sha256=sha256)


def _compare(expected: CheckpointFile, found: CheckpointFile) -> str:
    if found.size_bytes != expected.size_bytes:
        return f"{expected.path} has {found.size_bytes} bytes, expected {expected.size_bytes}"
    if found.sha256 != expected.sha256:
        return f"{expected.path} is damaged: its bytes do not match their hash"
    return ""


def _best(
    store: Store,
    name: str,
    manifest: CheckpointManifest,
    before: list[str],
    config: CheckpointConfig,
) -> list[str]:
    manifests = {name: manifest}
    manifests.update((old, found) for old in before if (found := read_manifest(store, old)[0]))
    values = {
        key: found.progress.metrics[config.best_metric]
        for key, found in manifests.items()
        if config.best_metric in found.progress.metrics
    }
    ranked = sorted(values, key=lambda key: values[key], reverse=config.best_is == "highest")
    return ranked[: config.keep_best]


def _download(store: Store, name: str, manifest: CheckpointManifest, folder: Path) -> list[str]:
    """Copies a checkpoint to this node. Returns what is wrong with each file."""
    shutil.rmtree(folder, ignore_errors=True)

    def one(file: CheckpointFile) -> str:
        path = folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with store.open(f"{FOLDER}/{name}/{file.path}") as source, path.open("wb") as target:
                sha256, size = digest_stream(source, target)
        except FileNotFoundError:
            return f"{file.path} is missing"
        return _compare(file, CheckpointFile(path=file.path, size_bytes=size, sha256=sha256))

    with ThreadPoolExecutor(DOWNLOADS) as pool:
        return list(pool.map(one, manifest.files))
