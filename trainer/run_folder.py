"""The folder of one training run: what it trains, how far it is, what came of it.

```
RUN/
  config.toml          the complete configuration, readable back
  run.json             what the run stands for; another configuration needs another folder
  owner                the process that may write here: the one that was started last
  metrics.jsonl        the learning curve
  bad_batch.json       the rows of a step that stopped the run
  rows.jsonl           with log.rows: which rows every step read
  tensorboard/         the same for TensorBoard
  checkpoints/         see trainer.checkpoints.store
  student/             the trained student, an ordinary Hugging Face folder
  summary.json         written last: the run is finished
```

The folder is any fsspec URL, or a path on a file system that all workers share. On an object store
there is no appending, so that the learning curve is written anew when a checkpoint is saved.
"""

import json
import os
import socket
import uuid
from typing import Any

from schemas.config import StrictModel, dump_toml
from schemas.errors import ConfigError, DamagedError, StudentError
from schemas.storage.store import Store
from trainer.config.train import TrainConfig

RunIdentity = dict[str, Any]

METRICS, ROWS, BAD_BATCH = "metrics.jsonl", "rows.jsonl", "bad_batch.json"
TENSORBOARD, STUDENT = "tensorboard", "student"

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
}
"""Keys that may change between a run and its continuation: none changes what is trained."""

_FREE_SECTIONS = ("ray", "checkpoint", "guard", "eval", "log")
"""Sections of such keys."""

_BOUND_KEYS = {"ray.use_gpu"}
"""Keys in them that do."""


class TrainSummary(StrictModel):
    """What a training run came to.

    Attributes:
        run: its folder.
        tokens: tokens of the rows trained on, counted once per epoch.
        labels: labelled positions among them.
        stopped_early: whether ``eval.patience`` ended it before its last step.
        best_eval: lowest value of ``eval.metric``, nats per label; None without evaluation.
        best_eval_step: the step that it was measured at.
        resumed_from_step: step of the checkpoint that the last process went on from; 0: none.
        final_loss: mean loss per label over the last logged steps.
        seconds: of the last process that trained, from its start to the export.
        data_wait_share: share of the training time spent waiting for data.
        checkpoint_wait_share: share of the training time spent waiting for checkpoints, on rank 0.
        checkpoint_hidden_share: share of the time that checkpoints took which was not waited for.
        rows_dropped: rows of the view left out because they are longer than data.max_tokens.
        exported: folder of the trained student.
    """

    run: str
    world_size: int
    zero_stage: int
    steps: int
    tokens: int
    labels: int
    stopped_early: bool
    best_eval: float | None
    best_eval_step: int
    resumed_from_step: int
    final_loss: float
    seconds: float
    tokens_per_s: float
    data_wait_share: float
    checkpoint_wait_share: float = 0.0
    checkpoint_hidden_share: float = 0.0
    rows_dropped: int
    view_hash: str
    label_sets: list[str]
    exported: str


class RunFolder:
    """The small files of a run, and where the others are.

    Attributes:
        url: as it was given.
        store: the folder.
        student: path or URL of the trained student.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.store = Store(url)
        self.student = f"{url.rstrip('/')}/{STUDENT}"

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
        _refuse_another_run(self.url, found, run_identity(config, view_hash, label_sets))
        return self.summary()

    def start(self, config: TrainConfig, view_hash: str, label_sets: list[str]) -> None:
        """Writes down what the run stands for."""
        identity = run_identity(config, view_hash, label_sets)
        if not self._has_results():
            self.store.write_bytes("config.toml", dump_toml(config).encode())
        self.store.write_bytes("run.json", _json(identity))

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
        self.store.write_bytes("owner", owner.encode())
        return owner

    def check_owner(self, owner: str) -> None:
        """Refuses to go on beside another process.

        Raises:
            StudentError: the folder was claimed by a later start, or is not there on this machine.
        """
        try:
            found = self.store.read_bytes("owner").decode()
        except FileNotFoundError as error:
            raise StudentError(
                f"run folder {self.url} is not there on {socket.gethostname()}; put it on a file "
                "system that all nodes share, or on an object store"
            ) from error
        if found != owner:
            _, host, pid = found.split()
            raise StudentError(
                f"{self.url} was started again by process {pid} on {host}, so this one stops"
            )

    def finish(self, summary: TrainSummary) -> None:
        """Writes the summary, which says that the run is finished."""
        self.store.write_bytes("summary.json", _json(summary.model_dump(mode="json")))

    def _has_results(self) -> bool:
        return bool(self.store.folders("checkpoints")) or self.store.exists("summary.json")

    def _read_json(self, name: str) -> Any:
        if not self.store.exists(name):
            return None
        try:
            return json.loads(self.store.read_bytes(name))
        except ValueError as error:
            raise DamagedError(
                f"{self.store.path(name)} is not readable as JSON ({error}); start again in a new "
                "run folder"
            ) from error


def run_identity(config: TrainConfig, view_hash: str, label_sets: list[str]) -> RunIdentity:
    """Everything that decides what a run trains, flat: key to value."""
    flat = _flatten(config.model_dump(mode="json"))
    identity = {key: value for key, value in flat.items() if not _is_free(key)}
    return {**identity, "view hash": view_hash, "label sets": label_sets}


def _is_free(key: str) -> bool:
    in_free_section = key.partition(".")[0] in _FREE_SECTIONS
    return key in _FREE_KEYS or (in_free_section and key not in _BOUND_KEYS)


def _refuse_another_run(path: str, found: RunIdentity, wanted: RunIdentity) -> None:
    missing = object()
    differing = [
        f"{key} (there {found.get(key)!r}, now {wanted.get(key)!r})"
        for key in sorted(found.keys() | wanted.keys())
        if not _is_free(key) and found.get(key, missing) != wanted.get(key, missing)
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
