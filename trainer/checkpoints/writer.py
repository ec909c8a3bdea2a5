"""Saves checkpoints in the background while training continues.

Training blocks only while its state is copied to host memory. A thread on each rank then writes and
hashes its files; once the threads of all ranks are done, rank 0 writes the manifest. The threads
use their own process group, since training communicates concurrently. Only one checkpoint is in
flight: a save waits for the previous one.

An error in the thread is raised in the training loop at its next step: a store failure as a
StudentError for the user, the loss of another rank unchanged, so that the workers are restarted.
"""

import contextlib
import copy
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from schemas.errors import StudentError, TutelageError, first_line
from schemas.storage.local_files import HashingWriter
from schemas.storage.store import Store
from trainer.checkpoints.store import (
    FOLDER,
    MANIFEST,
    CheckpointFile,
    CheckpointManifest,
    checkpoint_name,
    delete_old_checkpoints,
)
from trainer.checkpoints.train_progress import TrainProgress
from trainer.config.train import TrainConfig
from trainer.engine.collectives import gathered


class CheckpointWriter:
    """Saves this rank's part of the checkpoints of an attempt.

    Attributes:
        blocked_s: seconds that training has waited for checkpoints.
        copied_s: seconds spent copying to host memory, which always blocks training.
        busy_s: seconds spent writing, whether or not training waited.
    """

    def __init__(
        self, store: Store, attempt: str, config: TrainConfig, check_owner: Callable[[], None]
    ) -> None:
        """Collective.

        Args:
            store: the run's folder.
            attempt: name of this start of the workers, the same on all ranks.
            check_owner: raises if another process has taken over the run.
        """
        self.blocked_s = self.copied_s = self.busy_s = 0.0
        self._store, self._attempt, self._config = store, attempt, config.checkpoint
        self._check_owner = check_owner
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(
            backend="gloo", timeout=timedelta(seconds=config.deepspeed.timeout_s)
        )
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def hidden_share(self) -> float:
        """Share of the checkpoint time that overlapped with training."""
        total = self.copied_s + self.busy_s
        return max(0.0, 1.0 - self.blocked_s / total) if total else 0.0

    def save(self, engine: Any, progress: TrainProgress, label_sets: list[str]) -> None:
        """Saves the current state. Collective.

        Args:
            engine: the DeepSpeed engine.
            label_sets: fingerprints of the label sets that are trained on.

        Raises:
            TutelageError: the previous checkpoint could not be written. If another rank was lost
                in the meantime, torch's own error is raised instead.
        """
        before = time.perf_counter()
        self._join()
        joined = time.perf_counter()
        states = snapshot(engine)
        self.copied_s += time.perf_counter() - joined
        # Not in the thread: training advances the generators in the meantime.
        states[f"random_state_{self._rank}.pt"] = random_state()
        manifest = CheckpointManifest(
            world_size=self._world_size, label_sets=label_sets, progress=progress, files=[]
        )
        # A daemon thread, so that a hanging store cannot keep a failed worker alive.
        self._thread = threading.Thread(
            target=self._run, args=(states, manifest), name="checkpoint", daemon=True
        )
        self._thread.start()
        if not self._config.asynchronous:
            self._join()
        self.blocked_s += time.perf_counter() - before

    def check(self) -> None:
        """Raises the error of a failed save; does not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self._join()

    def wait(self) -> None:
        """Waits for the last save to finish; raises its error."""
        before = time.perf_counter()
        self._join()
        self.blocked_s += time.perf_counter() - before

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def _run(self, states: dict[str, Any], manifest: CheckpointManifest) -> None:
        before = time.perf_counter()
        try:
            self._write(states, manifest)
        except BaseException as error:  # noqa: BLE001  (raised again in the training)
            self._error = error
        self.busy_s += time.perf_counter() - before

    def _write(self, states: dict[str, Any], manifest: CheckpointManifest) -> None:
        step = manifest.progress.step
        name = checkpoint_name(step, self._attempt)
        folder = f"{FOLDER}/{name}"
        with self._store_failures(step):
            self._check_owner()
            # pop frees each state's memory once it is written.
            files = [write_state(self._store, folder, p, states.pop(p)) for p in sorted(states)]
        files = sorted(gathered(files, self._group), key=lambda file: file.path)
        if self._rank == 0:
            manifest = manifest.model_copy(update={"files": files})
            with self._store_failures(step):
                self._check_owner()
                data = manifest.model_dump_json(indent=2).encode()
                self._store.write_bytes(f"{folder}/{MANIFEST}", data)
                delete_old_checkpoints(self._store, name, manifest, self._config)
        # No rank may begin the next checkpoint, or exit, before this one is finished.
        dist.barrier(self._group)

    @contextlib.contextmanager
    def _store_failures(self, step: int) -> Iterator[None]:
        """Turns store failures into a StudentError with a remedy.

        Keep communication between ranks outside: its failure means a lost rank, which should
        restart the workers, whereas a StudentError ends the run.
        """
        try:
            yield
        except TutelageError:
            raise
        except Exception as error:
            raise StudentError(
                f"the checkpoint of step {step} could not be written to "
                f"{self._store.path(FOLDER)} ({type(error).__name__}: {first_line(error)}); "
                "check that the store is reachable and has free space, then start the run again: "
                "it resumes from the previous checkpoint"
            ) from error


def write_state(store: Store, folder: str, path: str, state: Any) -> CheckpointFile:
    """Writes one file durably. Returns size and SHA-256 of the bytes written."""
    rel = f"{folder}/{path}"
    with store.open(rel, "wb") as file:
        hashing = HashingWriter(file)
        torch.save(state, hashing)
    store.sync(rel)
    return CheckpointFile(path=path, size_bytes=hashing.size_bytes, sha256=hashing.sha256)


def snapshot(engine: Any) -> dict[str, Any]:
    """Copies this rank's checkpoint content to host memory. Collective.

    Returns:
        What ``engine.save_checkpoint`` would write, by file name.
    """
    snapshots = _Snapshots()
    original = engine.checkpoint_engine
    engine.checkpoint_engine = snapshots
    try:
        # The folder receives only scripts that DeepSpeed copies next to a checkpoint.
        with tempfile.TemporaryDirectory() as scratch:
            engine.save_checkpoint(scratch, tag="step", save_latest=False)
    finally:
        engine.checkpoint_engine = original
    return snapshots.states


def random_state() -> dict[str, torch.Tensor]:
    """Returns the states of this process's random generators."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


class _Snapshots:
    """A checkpoint engine for DeepSpeed that keeps copies instead of writing files."""

    def __init__(self) -> None:
        self.states: dict[str, Any] = {}

    def create(self, info: Any) -> None:
        pass

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def save(self, state_dict: Any, path: str) -> None:
        self.states[os.path.basename(path)] = _host_copy(state_dict, {})

    def commit(self, info: Any) -> bool:
        return True

    def is_decoupled(self) -> bool:
        return False


def _host_copy(item: Any, copies: dict[Any, torch.Tensor]) -> Any:
    """Copies all tensors of an item to host memory; repeated tensors are copied once.

    Copies only the tensor, not its entire storage, which is often a flat buffer of many tensors.
    """
    if isinstance(item, torch.Tensor):
        key = (item.data_ptr(), item.shape, item.stride(), item.dtype, item.device)
        if key not in copies or not item.numel():
            copies[key] = item.detach().to("cpu", copy=True)
        return copies[key]
    if isinstance(item, dict):
        same_kind = copy.copy(item)  # a state dict of a module also has an attribute
        same_kind.update((key, _host_copy(value, copies)) for key, value in item.items())
        return same_kind
    if isinstance(item, list):
        return [_host_copy(value, copies) for value in item]
    if type(item) is tuple:
        return tuple(_host_copy(value, copies) for value in item)
    return item
