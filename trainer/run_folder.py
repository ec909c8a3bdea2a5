"""The folder of one training run: what it trains, how far it is, what came of it.

```
RUN/
  config.toml          the complete configuration, readable back
  run.json             what the run stands for; another configuration needs another folder
  owner                the process that may write here: the one that was started last
  metrics.jsonl        the learning curve
  bad_batch.json       the rows of a step that stopped the run
  tensorboard/         the same for TensorBoard
  checkpoints/         see trainer.checkpoint
  student/             the trained student, an ordinary Hugging Face folder
  summary.json         written last: the run is finished
```

The folder must be on a file system that all workers share.
"""

import json
import os
import socket
import tempfile
import uuid
from pathlib import Path
from typing import Any

from schemas.config import StrictModel, dump_toml
from schemas.errors import ConfigError, DamagedError, StudentError
from trainer.config import TrainConfig

RunIdentity = dict[str, Any]

_FREE_KEYS = {
    "run",
    "view",  # its content is pinned by hash, wherever it lies
    "loss.chunk_tokens",
    "loss.head_memory_bytes",
    "loss.kernel",
    "data.cache_bytes",
    "data.prefetch_steps",
    "deepspeed.timeout_s",
    "deepspeed.gradient_checkpointing",
    "ray.address",
    "ray.cpus_per_worker",
    "ray.max_failures",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "guard.spikes",
    "guard.spike_factor",
    "guard.window_steps",
    "log.every_steps",
    "log.tensorboard",
}
"""Keys that may change between a run and its continuation: none changes what is trained."""


class TrainSummary(StrictModel):
    """What a training run came to.

    Attributes:
        run: its folder.
        tokens: tokens of the rows trained on, counted once per epoch.
        labels: labelled positions among them.
        resumed_from_step: step of the checkpoint that the last process went on from; 0: none.
        final_loss: mean loss per label over the last logged steps.
        seconds: of the last process that trained, from its start to the export.
        data_wait_share: share of the training time spent waiting for data.
        rows_dropped: rows of the view left out because they are longer than data.max_tokens.
        exported: folder of the trained student.
    """

    run: str
    world_size: int
    zero_stage: int
    steps: int
    tokens: int
    labels: int
    resumed_from_step: int
    final_loss: float
    seconds: float
    tokens_per_s: float
    data_wait_share: float
    rows_dropped: int
    view_hash: str
    label_sets: list[str]
    exported: str


class RunFolder:
    """Paths and the small files of a run."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.student = self.path / "student"
        self.bad_batch = self.path / "bad_batch.json"

    def finished(
        self, config: TrainConfig, view_hash: str, label_sets: list[str]
    ) -> TrainSummary | None:
        """The summary of the run if it is finished.

        Raises:
            ConfigError: the folder holds a run of another configuration or view; names the keys.
        """
        found = self._read_json("run.json")
        # Where nothing was saved, there is nothing that another configuration could spoil.
        if found is None or not self._has_results():
            return None
        _refuse_another_run(self.path, found, run_identity(config, view_hash, label_sets))
        return self.summary()

    def start(self, config: TrainConfig, view_hash: str, label_sets: list[str]) -> None:
        """Writes down what the run stands for."""
        identity = run_identity(config, view_hash, label_sets)
        if not self._has_results():
            write_atomic(self.path / "config.toml", dump_toml(config).encode())
        write_atomic(self.path / "run.json", _json(identity))

    def summary(self) -> TrainSummary | None:
        """What the run came to; None while it is not finished."""
        summary = self._read_json("summary.json")
        return None if summary is None else TrainSummary.model_validate(summary)

    def claim(self) -> str:
        """Makes the caller the only one that may write here.

        Workers of a driver that was killed may live on for a while; they find at their next write
        that they are not the owner any more.

        Returns:
            What to show to ``check_owner``.
        """
        owner = f"{uuid.uuid4().hex} {socket.gethostname()} {os.getpid()}"
        write_atomic(self.path / "owner", owner.encode())
        return owner

    def check_owner(self, owner: str) -> None:
        """Refuses to go on beside another process.

        Raises:
            StudentError: the folder was claimed by a later start, or is not there on this machine.
        """
        try:
            found = (self.path / "owner").read_text()
        except FileNotFoundError as error:
            raise StudentError(
                f"run folder {self.path} is not there on {socket.gethostname()}; put it on a file "
                "system that all nodes share"
            ) from error
        if found != owner:
            _, host, pid = found.split()
            raise StudentError(
                f"{self.path} was started again by process {pid} on {host}, so this one stops"
            )

    def finish(self, summary: TrainSummary) -> None:
        """Writes the summary, which says that the run is finished."""
        write_atomic(self.path / "summary.json", _json(summary.model_dump(mode="json")))

    def _has_results(self) -> bool:
        return self.checkpoints.exists() or (self.path / "summary.json").exists()

    def _read_json(self, name: str) -> Any:
        path = self.path / name
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise DamagedError(
                f"{path} is not readable as JSON ({error}); start again in a new run folder"
            ) from error


def run_identity(config: TrainConfig, view_hash: str, label_sets: list[str]) -> RunIdentity:
    """Everything that decides what a run trains, flat: key to value."""
    flat = _flatten(config.model_dump(mode="json"))
    identity = {key: value for key, value in flat.items() if key not in _FREE_KEYS}
    return {**identity, "view hash": view_hash, "label sets": label_sets}


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file so that a reader finds all of it or none, also after a crash."""
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.name}.", delete=False) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    sync_folder(folder)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _refuse_another_run(path: Path, found: RunIdentity, wanted: RunIdentity) -> None:
    missing = object()
    differing = [
        f"{key} (there {found.get(key)!r}, now {wanted.get(key)!r})"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key, missing) != wanted.get(key, missing)
    ]
    if differing:
        raise ConfigError(
            f"run folder {path} holds another run; it differs in {', '.join(differing)}. "
            "Put the values back to go on with it, or choose a new folder: run=..."
        )


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value and prefix + key != "student.config":
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
