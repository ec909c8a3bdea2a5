"""JSON-lines files, keyed by step, that a resumed run continues.

`StepLines` backs metrics.jsonl; `RowLog` writes rows.jsonl.
"""

import json
import os

import numpy as np

from schemas.label_set.tables import key_array
from schemas.storage.store import Store
from trainer.config.train import DataConfig
from trainer.data.mixture import TrainingView
from trainer.data.row_order import Int64s, view_rows
from trainer.run_folder import ROWS


class StepLines:
    """Appends lines. Only one process may have a file open.

    On a local file system each line is written immediately. An object store cannot append, so
    ``flush`` rewrites all lines.
    """

    def __init__(self, store: Store, name: str, done: int) -> None:
        """
        Args:
            store: the run's folder.
            name: name of the file.
            done: step of the checkpoint that the run resumes from; later lines, left by a killed
                process, are removed because those steps run again.
        """
        self._store, self._name = store, name
        text = store.read_bytes(name).decode() if store.exists(name) else ""
        self._lines = [line for line in text.splitlines() if _step(line) <= done]
        self._write_all()
        # Local files are appended to; elsewhere the lines are kept to be rewritten.
        self._file = open(store.path(name), "a") if store.is_local else None  # noqa: SIM115

    def append(self, line: str) -> None:
        """Adds a line, which must have a key ``step``."""
        if self._file is None:
            self._lines.append(line)
        else:
            self._file.write(f"{line}\n")
            self._file.flush()

    def flush(self) -> None:
        """Makes all lines durable."""
        if self._file is None:
            self._write_all()
        else:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Makes all lines durable and closes the file."""
        self.flush()
        if self._file is not None:
            self._file.close()

    def _write_all(self) -> None:
        self._store.write_bytes(self._name, "".join(f"{line}\n" for line in self._lines).encode())


class RowLog(StepLines):
    """rows.jsonl: the rows of every step, for comparing two runs sample by sample.

    A line is ``{"step": 1, "rows": ["<row key in hex>", ...]}``: lane by lane in pack order,
    independent of the number of workers.
    """

    def __init__(self, store: Store, view: TrainingView, data: DataConfig, done: int) -> None:
        """
        Args:
            store: the run's folder.
            view: the rows that are trained on.
            done: see `StepLines`.
        """
        super().__init__(store, ROWS, done)
        self._view, self._data = view, data

    def add(self, step: int, packs: list[Int64s]) -> None:
        """Adds a step.

        Args:
            packs: row ids of each lane.
        """
        numbers = view_rows(self._view, self._data, np.concatenate(packs))
        keys = [bytes(key).hex() for key in key_array(self._view.table.take(numbers), "row_key")]
        self.append(json.dumps({"step": step, "rows": keys}))


def _step(line: str) -> float:
    """Step of a line; infinity if the line is truncated."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")
