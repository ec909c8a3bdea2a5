"""Records of what a teacher was working on, so that a row that kills its engine is found.

A record is written before rows go to the engine and removed when they come back. One that is left
over tells that the engine died over these rows: a process that segfaults cannot say so itself.
Records count within one run only, and not where the node was lost or the process was ended from
outside in order.
"""

import atexit
import json
import uuid
from collections.abc import Callable

from schemas.storage import Store

FOLDER = "attempts"


def _never(_: str) -> bool:
    return False


class Attempts:
    """The attempts of one run, seen from one process."""

    def __init__(
        self, store: Store, run: str, node: str = "", is_lost: Callable[[str], bool] = _never
    ) -> None:
        """Prepares.

        Args:
            store: Of the label set.
            run: Identity of the run.
            node: Name of the node that this process is on.
            is_lost: Says of the name of a node whether that node is gone.
        """
        self._store = store
        self._run = run
        self._node = node
        self._is_lost = is_lost
        self._open: set[str] = set()
        atexit.register(self._forget)  # runs on SIGTERM under Ray, but not when an engine crashes

    def deaths(self, key: str) -> int:
        """How many attempts at the rows of a key did not come back."""
        left = self._store.list(f"{FOLDER}/{self._run}/{key}", ".json")
        nodes = [json.loads(self._store.read_bytes(rel))["node"] for rel in left]
        return sum(1 for node in nodes if not self._is_lost(node))

    def begin(self, key: str) -> str:
        """Records an attempt; returns its name for ``end``."""
        rel = f"{FOLDER}/{self._run}/{key}/{uuid.uuid4().hex}.json"
        self._store.write_bytes(rel, json.dumps({"node": self._node}).encode())
        self._open.add(rel)
        return rel

    def end(self, rel: str) -> None:
        """Removes the record of an attempt that came back."""
        self._store.delete(rel)
        self._open.discard(rel)

    def clear(self, key: str) -> None:
        """Removes every record of a key: it has been shown to be harmless."""
        self._store.delete(f"{FOLDER}/{self._run}/{key}")
        self._open = {rel for rel in self._open if f"/{key}/" not in rel}

    def failed(self, rel: str) -> None:
        """Leaves the record of an attempt whose engine failed while this process lives on."""
        self._open.discard(rel)

    def _forget(self) -> None:
        for rel in tuple(self._open):
            self.end(rel)


def remove_attempts(store: Store, run: str) -> None:
    """Removes what is left of a run's records, once it is over."""
    store.delete(f"{FOLDER}/{run}")
