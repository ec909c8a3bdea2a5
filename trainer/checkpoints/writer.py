"""Saves checkpoints while the training goes on.

The training waits only while its state is copied to memory of the host. A thread then writes each
file, hashes it on the way, and, when the threads of all ranks are done, rank 0 writes the manifest.
The threads speak to each other over a process group of their own, since the training uses its own
at the same time. One checkpoint is written at a time: the next save waits for the last. What fails
in the thread is raised in the training, at its next step: what the store has against the files, as
an error for a person; that another rank was lost, as it is, so that the workers start again.
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

from schemas.errors import StudentError, TutelageError
from schemas.storage.local_files import HashingWriter
from schemas.storage.store import Store
from trainer.checkpoints.store import (
    FOLDER,
    MANIFEST,
    CheckpointFile,
    CheckpointManifest,
    TrainProgress,
    checkpoint_name,
    keep_only,
)
from trainer.config.train import TrainConfig
from trainer.engine.collectives import gathered


class CheckpointWriter:
    """One rank's part in every checkpoint of an attempt.

    Attributes:
        blocked_s: seconds that the training waited for checkpoints so far.
        copied_s: seconds that copying took, which is always waited for.
        busy_s: seconds that writing took, waited for or not.
    """

    def __init__(
        self, store: Store, attempt: str, config: TrainConfig, check_owner: Callable[[], None]
    ) -> None:
        """Collective.

        Args:
            store: the run's folder.
            attempt: name of this start of the workers, the same on all ranks.
            check_owner: raises where another process has taken the run over.
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
        """Chunk of the time that checkpoints took which the training did not wait."""
        whole = self.copied_s + self.busy_s
        return max(0.0, 1.0 - self.blocked_s / whole) if whole else 0.0

    def save(self, engine: Any, progress: TrainProgress, label_sets: list[str]) -> None:
        """Saves the run as it is now. Collective.

        Args:
            engine: the DeepSpeed engine.
            label_sets: fingerprints of the label sets that are trained on.

        Raises:
            TutelageError: the checkpoint before could not be written. Where another rank was lost
                meanwhile, what torch raises.
        """
        before = time.perf_counter()
        self._join()
        joined = time.perf_counter()
        states = snapshot(engine)
        self.copied_s += time.perf_counter() - joined
        states[f"random_state_{self._rank}.pt"] = random_state()
        manifest = CheckpointManifest(
            world_size=self._world_size, label_sets=label_sets, progress=progress, files=[]
        )
        self._thread = threading.Thread(
            target=self._run, args=(states, manifest), name="checkpoint", daemon=True
        )
        self._thread.start()
        if not self._config.asynchronous:
            self._join()
        self.blocked_s += time.perf_counter() - before

    def check(self) -> None:
        """Raises what went wrong in the thread, if it has ended so."""
        if self._thread is not None and not self._thread.is_alive():
            self._join()

    def wait(self) -> None:
        """Waits until what was saved is finished, or raises why it could not be."""
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
        with self._blaming_the_store(step):
            self._check_owner()
            # Each state is let go once it is written.
            files = [write_state(self._store, folder, p, states.pop(p)) for p in sorted(states)]
        everyone = gathered(files, self._group)
        if self._rank == 0:
            whole = manifest.model_copy(
                update={"files": sorted(everyone, key=lambda file: file.path)}
            )
            with self._blaming_the_store(step):
                self._check_owner()
                data = whole.model_dump_json(indent=2).encode()
                self._store.write_bytes(f"{folder}/{MANIFEST}", data)
                keep_only(self._store, name, whole, self._config)
        # So that no rank goes on to the next checkpoint, or ends, before this one is finished.
        dist.barrier(self._group)

    @contextlib.contextmanager
    def _blaming_the_store(self, step: int) -> Iterator[None]:
        """Says what to do about what fails here.

        Not for what ranks say to each other: that fails where one of them was lost, for which the
        workers start again, while a StudentError would end the run.
        """
        try:
            yield
        except TutelageError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise StudentError(
                f"the checkpoint of step {step} could not be written to "
                f"{self._store.path(FOLDER)} ({type(error).__name__}: {reason}); look whether "
                "there is room and the store can be reached, then start the run again: it goes on "
                "from the checkpoint before"
            ) from error


def write_state(store: Store, folder: str, path: str, state: Any) -> CheckpointFile:
    """Writes one file durably and returns what is in it, by the bytes that were written."""
    rel = f"{folder}/{path}"
    with store.open(rel, "wb") as file:
        hashing = HashingWriter(file)
        torch.save(state, hashing)
    store.sync(rel)
    return CheckpointFile(path=path, size_bytes=hashing.size_bytes, sha256=hashing.sha256)


def snapshot(engine: Any) -> dict[str, Any]:
    """This rank's part of what ``engine.save_checkpoint`` would write, copied to host memory.

    Returns:
        By file name, what the file holds. Collective.
    """
    taken = _Snapshots()
    writes = engine.checkpoint_engine
    engine.checkpoint_engine = taken
    try:
        # DeepSpeed also copies scripts of its own beside a checkpoint; they are not kept.
        with tempfile.TemporaryDirectory() as nowhere:
            engine.save_checkpoint(nowhere, tag="step", save_latest=False)
    finally:
        engine.checkpoint_engine = writes
    return taken.states


def random_state() -> dict[str, torch.Tensor]:
    """The states of this process's random generators."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


class _Snapshots:
    """Stands in for DeepSpeed's checkpoint engine: keeps copies instead of writing files."""

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
    """A copy with all its tensors in host memory; a tensor that occurs twice is copied once.

    Tensors are copied without what else is in their storage, which is often a flat buffer of many.
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
