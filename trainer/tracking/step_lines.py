"""A file of JSON lines, one for a step, that a continued run goes on with."""

import json
import os

from schemas.storage.store import Store


class StepLines:
    """Appends lines. Only one process may have a file open.

    On a local file system a line is written at once. An object store cannot append: there all lines
    are written anew by ``flush``.
    """

    def __init__(self, store: Store, name: str, done: int) -> None:
        """
        Args:
            store: the run's folder.
            name: of the file in it.
            done: steps of the checkpoint that the run goes on from; later lines of a process that
                was killed are removed, since they come again.
        """
        self._store, self._name = store, name
        text = store.read_bytes(name).decode() if store.exists(name) else ""
        self._lines = [line for line in text.splitlines() if _step(line) <= done]
        self._write()
        if store.is_local:
            self._file = open(store.path(name), "a")  # noqa: SIM115  (closed by close)
            self._lines.clear()

    def append(self, line: str) -> None:
        """Adds a line, which must have a key ``step``."""
        if self._store.is_local:
            self._file.write(f"{line}\n")
            self._file.flush()
        else:
            self._lines.append(line)

    def flush(self) -> None:
        """Makes all lines durable."""
        if self._store.is_local:
            os.fsync(self._file.fileno())
        else:
            self._write()

    def close(self) -> None:
        """Makes all lines durable and closes the file."""
        self.flush()
        if self._store.is_local:
            self._file.close()

    def _write(self) -> None:
        data = "".join(f"{line}\n" for line in self._lines).encode()
        self._store.write_bytes(self._name, data)


def _step(line: str) -> float:
    """Step of a line; infinity for one that was cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")
