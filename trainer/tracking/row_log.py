"""rows.jsonl: which rows every step read, so that two runs can be compared sample by sample."""

import json

import numpy as np

from schemas.label_set.tables import key_array
from schemas.storage.store import Store
from schemas.views.view import View
from trainer.config.train import DataConfig
from trainer.data.row_order import Int64s, view_rows
from trainer.run_folder import ROWS
from trainer.tracking.step_lines import StepLines


class RowLog:
    """Writes a line for every step: ``{"step": 1, "rows": ["<row key in hex>", ...]}``.

    The rows stand lane by lane, each in the order of its pack, whatever the number of workers.
    """

    def __init__(self, store: Store, view: View, data: DataConfig, done: int) -> None:
        """
        Args:
            store: the run's folder.
            view: what is trained on.
            done: steps of the checkpoint that the run goes on from.
        """
        self._lines, self._view, self._data = StepLines(store, ROWS, done), view, data

    def append(self, step: int, packs: list[Int64s]) -> None:
        """Adds a step.

        Args:
            packs: for every lane the ids of its rows.
        """
        numbers = view_rows(self._view, self._data, np.concatenate(packs))
        keys = [bytes(key).hex() for key in key_array(self._view.table.take(numbers), "row_key")]
        self._lines.append(json.dumps({"step": step, "rows": keys}))

    def flush(self) -> None:
        """Makes all lines durable."""
        self._lines.flush()

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()
