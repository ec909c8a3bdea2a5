"""Records which rows an engine is working on, to identify a row that crashes it.

A process that segfaults cannot report its rows. So a record is written before rows go to the engine
and removed when they return: a leftover record means that the engine crashed on these rows. Records
count only within one run, and not if the node was lost or the process was terminated gracefully.

A record also states whether its rows had the engine to themselves: in a shared engine, any row in
flight may have caused the crash.
"""

import atexit
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from schemas.errors import StoreError
from schemas.storage.store import Store

FOLDER = "attempts"


def _never(_: str) -> bool:
    return False


@dataclass(frozen=True)
class CrashCounts:
    """Engine crashes on the rows of one key.

    Attributes:
        shared: while the engine was also running other rows.
        alone: while it was running only these rows.
    """

    shared: int = 0
    alone: int = 0

    @property
    def total(self) -> int:
        """Shared and exclusive crashes together."""
        return self.shared + self.alone


class Attempts:
    """The attempt records of one run, written and read by one process."""

    def __init__(
        self,
        store: Store,
        run: str,
        node: str = "",
        is_lost: Callable[[str], bool] = _never,
        actor: str = "only",
    ) -> None:
        """
        Args:
            store: store of the label set.
            run: run id.
            node: name of this process's node.
            is_lost: returns whether the named node has left the cluster.
            actor: name of this process's actor; survives a restart of the actor.
        """
        self._store = store
        self._run = run
        self._node = node
        self._is_lost = is_lost
        self._actor = actor
        self._open: set[str] = set()
        atexit.register(self._end_all)  # runs on SIGTERM under Ray, but not when an engine crashes

    def own_key(self, phase: str) -> str:
        """The key of an attempt without rows, such as an engine start.

        One per actor: with a shared key, in-flight attempts of other actors would count as crashes.
        """
        return f"{phase}-{self._actor}"

    def count_crashes(self, key: str) -> CrashCounts:
        """Counts the attempts at the rows of a key that never returned."""
        read = [self._read(rel) for rel in self._records(key)]
        records = [record for record in read if record is not None]
        # The loss of a node ends its attempts, so these records blame no row.
        alone = [record["alone"] for record in records if not self._is_lost(record["node"])]
        return CrashCounts(shared=alone.count(False), alone=alone.count(True))

    def begin(self, key: str, alone: bool = True) -> str:
        """Records an attempt; returns the path of the record.

        Args:
            key: key of the rows, or from ``own_key``.
            alone: whether the rows have the engine to themselves.
        """
        rel = f"{FOLDER}/{self._run}/{key}/{uuid.uuid4().hex}.json"
        self._store.write_bytes(rel, json.dumps({"node": self._node, "alone": alone}).encode())
        self._open.add(rel)
        return rel

    def end(self, rel: str) -> None:
        """Removes the record of an attempt that returned."""
        self._store.delete(rel)
        self._open.discard(rel)

    def keep(self, rel: str) -> None:
        """Keeps the record of an attempt that crashed the engine but not this process."""
        self._open.discard(rel)

    def clear(self, key: str) -> None:
        """Removes all records of a key after an attempt has succeeded."""
        # File by file: another attempt may be starting in the same folder.
        for rel in self._records(key):
            self._store.delete(rel)
        self._open = {rel for rel in self._open if f"/{key}/" not in rel}

    def _records(self, key: str) -> list[str]:
        return self._store.list(f"{FOLDER}/{self._run}/{key}", ".json")

    def _read(self, rel: str) -> dict[str, Any] | None:
        """Returns a record, or None if its attempt has ended since it was listed."""
        try:
            record: dict[str, Any] = json.loads(self._store.read_bytes(rel))
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
        return record

    def _end_all(self) -> None:
        for rel in tuple(self._open):
            self.end(rel)


def remove_attempts(store: Store, run: str) -> None:
    """Removes all records of a finished run."""
    store.delete(f"{FOLDER}/{run}")
