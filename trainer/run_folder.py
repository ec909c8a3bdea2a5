"""The folder of a training run: configuration, progress and results.

```
RUN/
  config.toml          the complete configuration, in loadable form
  run.json             identity of the run; a different configuration needs a different folder
  owner                the process allowed to write here, which is the one started last
  metrics.jsonl        the learning curve
  bad_batch.json       the rows of a step that stopped the run
  rows.jsonl           with log.rows: the rows of every step
  tensorboard/         the learning curve for TensorBoard
  checkpoints/         see trainer.checkpoints.store
  student/             the trained student, an ordinary Hugging Face folder
  summary.json         written last, marks the run as finished
```

The folder is an fsspec URL or a path on a file system that all workers share. Object stores cannot
append, so there the learning curve is rewritten with every checkpoint.
"""

import json
import os
import socket
import uuid
from collections.abc import Container, Mapping
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
    "view",  # identified by the hash of its content, not by its URL
    "loss.chunk_tokens",
    "loss.head_memory_bytes",
    "loss.kernel",
    "data.cache_bytes",
    "data.prefetch_steps",
    "deepspeed.timeout_s",
    "deepspeed.gradient_checkpointing",
}
"""Keys that may change on resume because they do not affect the result."""

_FREE_SECTIONS = ("ray", "checkpoint", "guard", "eval", "log")
"""Sections whose keys may change on resume, except for _BOUND_KEYS."""

_BOUND_KEYS = {"ray.use_gpu"}


class TrainSummary(StrictModel):
    """summary.json: the result of a training run.

    Attributes:
        run: folder of the run.
        tokens: tokens of the rows trained on, counted once per epoch.
        labels: labelled positions among them.
        stopped_early: whether ``eval.patience`` ended the run before its last step.
        best_eval: lowest value of ``eval.metric``, nats per label; None without evaluation.
        best_eval_step: step of ``best_eval``.
        resumed_from_step: step of the checkpoint that the last process resumed from; 0: none.
        final_loss: mean loss per label over the last logged steps.
        seconds: duration of the last training process, from its start to the export.
        data_wait_share: share of the training time spent waiting for data.
        checkpoint_wait_share: share of the training time spent waiting for checkpoints, on rank 0.
        checkpoint_hidden_share: share of the checkpoint time that overlapped with training.
        rows_dropped: rows of the view dropped because they exceed data.max_tokens.
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
    """Identity, owner and summary of a run.

    Attributes:
        url: as given.
        store: store of the folder.
        student: path or URL of the trained student.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.store = Store(url)
        self.student = f"{url.rstrip('/')}/{STUDENT}"

    def finished(
        self, config: TrainConfig, view_hash: str, label_sets: list[str]
    ) -> TrainSummary | None:
        """Returns the summary of the run, or None if it is not finished.

        Raises:
            ConfigError: the folder holds a run with another configuration or view; names the keys.
        """
        found = self._read_json("run.json")
        # A folder without results may be used for any configuration.
        if found is None or not self._has_results():
            return None
        _refuse_another_run(self.url, found, run_identity(config, view_hash, label_sets))
        return self.summary()

    def start(self, config: TrainConfig, view_hash: str, label_sets: list[str]) -> None:
        """Writes the run's configuration and identity."""
        identity = run_identity(config, view_hash, label_sets)
        if not self._has_results():
            self.store.write_bytes("config.toml", dump_toml(config).encode())
        self.store.write_bytes("run.json", _json(identity))

    def summary(self) -> TrainSummary | None:
        """Returns the result of the run, or None while it is not finished."""
        summary = self._read_json("summary.json")
        return None if summary is None else TrainSummary.model_validate(summary)

    def claim(self) -> str:
        """Makes the caller the owner, the only process allowed to write here.

        Workers may outlive a killed driver for a while; at their next write they detect that they
        no longer own the folder.

        Returns:
            A token for ``check_owner``.
        """
        owner = f"{uuid.uuid4().hex} {socket.gethostname()} {os.getpid()}"
        self.store.write_bytes("owner", owner.encode())
        return owner

    def check_owner(self, owner: str) -> None:
        """Prevents concurrent writes; call it before every write.

        Raises:
            StudentError: another process has claimed the folder since, or the folder does not exist
                on this machine.
        """
        try:
            found = self.store.read_bytes("owner").decode()
        except FileNotFoundError as error:
            raise StudentError(
                f"run folder {self.url} does not exist on {socket.gethostname()}; put it on a "
                "shared file system or an object store"
            ) from error
        if found != owner:
            _, host, pid = found.split()
            raise StudentError(
                f"{self.url} was restarted by process {pid} on {host}; this process stops"
            )

    def finish(self, summary: TrainSummary) -> None:
        """Writes the summary, which marks the run as finished."""
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
                f"{self.store.path(name)} is not valid JSON ({error}); start over in a new run "
                "folder"
            ) from error


def run_identity(config: TrainConfig, view_hash: str, label_sets: list[str]) -> RunIdentity:
    """Returns everything that determines the result of a run, by dotted key."""
    flat = flatten(config.model_dump(mode="json"), leaves={"student.config"})
    identity = {key: value for key, value in flat.items() if not _is_free(key)}
    return {**identity, "view hash": view_hash, "label sets": label_sets}


def _is_free(key: str) -> bool:
    in_free_section = key.partition(".")[0] in _FREE_SECTIONS
    return key in _FREE_KEYS or (in_free_section and key not in _BOUND_KEYS)


def _refuse_another_run(path: str, found: RunIdentity, wanted: RunIdentity) -> None:
    missing = object()
    differing = [
        f"{key} (found {found.get(key)!r}, now {wanted.get(key)!r})"
        for key in sorted(found.keys() | wanted.keys())
        if not _is_free(key) and found.get(key, missing) != wanted.get(key, missing)
    ]
    if differing:
        raise ConfigError(
            f"run folder {path} holds a different run; changed: {', '.join(differing)}. "
            "Restore these values to resume that run, or choose a new folder: run=..."
        )


def flatten(
    tree: Mapping[str, Any], leaves: Container[str] = (), prefix: str = ""
) -> dict[str, Any]:
    """Flattens nested tables to dotted keys.

    Args:
        leaves: keys whose tables are kept as values; empty tables always are.
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value and prefix + key not in leaves:
            flat.update(flatten(value, leaves, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
