"""Records of what a teacher is working on, so that a row that crashes its engine is found.

A process that segfaults cannot report which rows it had. So a record is written before rows go to
the engine and removed when they come back: one that is left over means that the engine crashed over
these rows. Records count within one run only, and not where the node was lost or the process was
ended from outside in an orderly way.

A record also says whether its rows had the engine to themselves; where they shared it, which
rows caused the crash is unknown.
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
class Crashes:
    """Attempts at the rows of a key that did not come back.

    Attributes:
        shared: while the engine worked on other rows too.
        alone: while it had these rows only.
    """

    shared: int = 0
    alone: int = 0

    @property
    def total(self) -> int:
        """Both."""
        return self.shared + self.alone


class Attempts:
    """The attempts of one run, as seen from one process."""

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
            store: of the label set.
            run: identity of the run.
            node: name of the node of this process.
            is_lost: whether the node of a name has left the cluster.
            actor: name of the actor of this process, kept when the actor is restarted.
        """
        self._store = store
        self._run = run
        self._node = node
        self._is_lost = is_lost
        self._actor = actor
        self._open: set[str] = set()
        atexit.register(self._end_all)  # runs on SIGTERM under Ray, but not when an engine crashes

    def own_key(self, phase: str) -> str:
        """The key of an attempt that involves no rows, such as starting an engine.

        Each actor has its own: with a shared key it would count attempts of other actors that are
        still in flight as crashes.
        """
        return f"{phase}-{self._actor}"

    def crashes(self, key: str) -> Crashes:
        """The attempts at the rows of a key that did not come back."""
        read = [self._read(rel) for rel in self._records(key)]
        records = [record for record in read if record is not None]
        alone = [record["alone"] for record in records if not self._is_lost(record["node"])]
        # A lost node takes its attempts with it, whatever rows they had.
        return Crashes(shared=alone.count(False), alone=alone.count(True))

    def begin(self, key: str, alone: bool = True) -> str:
        """Records an attempt; returns the name of the record.

        Args:
            key: of the rows, or from ``own_key``.
            alone: the rows have the engine to themselves.
        """
        rel = f"{FOLDER}/{self._run}/{key}/{uuid.uuid4().hex}.json"
        self._store.write_bytes(rel, json.dumps({"node": self._node, "alone": alone}).encode())
        self._open.add(rel)
        return rel

    def end(self, rel: str) -> None:
        """Removes the record of an attempt that came back."""
        self._store.delete(rel)
        self._open.discard(rel)

    def keep(self, rel: str) -> None:
        """Keeps the record of an attempt that crashed its engine but not this process."""
        self._open.discard(rel)

    def clear(self, key: str) -> None:
        """Removes every record of a key, because an attempt has succeeded."""
        # File by file: another attempt may begin in the same folder at this moment.
        for rel in self._records(key):
            self._store.delete(rel)
        self._open = {rel for rel in self._open if f"/{key}/" not in rel}

    def _records(self, key: str) -> list[str]:
        return self._store.list(f"{FOLDER}/{self._run}/{key}", ".json")

    def _read(self, rel: str) -> dict[str, Any] | None:
        """A record; None where the attempt has ended since it was listed."""
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
    """Removes the records of a run that is over."""
    store.delete(f"{FOLDER}/{run}")
