"""Records of what a teacher was working on, so that a row that kills its engine is found.

A record is written before rows go to the engine and removed when they come back. One that is left
over tells that the engine died over these rows: a process that segfaults cannot say so itself.
Records count within one run only, and not where the node was lost or the process was ended from
outside in order.

A record also says whether these rows had the engine to themselves. Where they shared it with the
rows of other records, nobody knows over which of them it died.
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
class Deaths:
    """Attempts at the rows of a key that did not come back.

    Attributes:
        together: While the engine worked on other rows too.
        alone: While it had these rows only.
    """

    together: int = 0
    alone: int = 0

    @property
    def total(self) -> int:
        """Both."""
        return self.together + self.alone


class Attempts:
    """The attempts of one run, seen from one process."""

    def __init__(
        self,
        store: Store,
        run: str,
        node: str = "",
        is_lost: Callable[[str], bool] = _never,
        actor: str = "only",
    ) -> None:
        """Prepares.

        Args:
            store: Of the label set.
            run: Identity of the run.
            node: Name of the node that this process is on.
            is_lost: Says of the name of a node whether that node is gone.
            actor: Name of the actor that this process is, which it keeps when it is restarted.
        """
        self._store = store
        self._run = run
        self._node = node
        self._is_lost = is_lost
        self._actor = actor
        self._open: set[str] = set()
        atexit.register(self._forget)  # runs on SIGTERM under Ray, but not when an engine crashes

    def own_key(self, what: str) -> str:
        """The key of something that is tried without rows, such as to start an engine.

        It is this actor's own: of a key that actors share, each would take the attempts of the
        others that are still in flight for deaths.
        """
        return f"{what}-{self._actor}"

    def deaths(self, key: str) -> Deaths:
        """The attempts at the rows of a key that did not come back."""
        read = [self._read(rel) for rel in self._records(key)]
        records = [record for record in read if record is not None]
        alone = [record["alone"] for record in records if not self._is_lost(record["node"])]
        return Deaths(together=alone.count(False), alone=alone.count(True))

    def begin(self, key: str, alone: bool = True) -> str:
        """Records an attempt at rows, alone in the engine or not; returns its name for ``end``."""
        rel = f"{FOLDER}/{self._run}/{key}/{uuid.uuid4().hex}.json"
        self._store.write_bytes(rel, json.dumps({"node": self._node, "alone": alone}).encode())
        self._open.add(rel)
        return rel

    def end(self, rel: str) -> None:
        """Removes the record of an attempt that came back."""
        self._store.delete(rel)
        self._open.discard(rel)

    def clear(self, key: str) -> None:
        """Removes every record of a key: it has been shown to be harmless."""
        for rel in self._records(key):  # not their folder, in which another may begin just now
            self._store.delete(rel)
        self._open = {rel for rel in self._open if f"/{key}/" not in rel}

    def failed(self, rel: str) -> None:
        """Leaves the record of an attempt whose engine failed while this process lives on."""
        self._open.discard(rel)

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

    def _forget(self) -> None:
        for rel in tuple(self._open):
            self.end(rel)


def remove_attempts(store: Store, run: str) -> None:
    """Removes what is left of a run's records, once it is over."""
    store.delete(f"{FOLDER}/{run}")
