"""Explains a slow start: no teacher is running yet, often because other jobs hold the GPUs."""

import time
from collections.abc import Callable, Mapping

from labeler.run.ray_cluster.resources import Resources
from schemas.console.text import duration_text

DELAY_S = 30.0
"""Seconds without a running teacher before the notice appears."""


class StartupNotice:
    """Prints at most two lines if teachers start late, otherwise none."""

    def __init__(
        self,
        resources: Resources,
        num_teachers: int,
        say: Callable[[str], None],
        free: Callable[[], Mapping[str, float]],
    ) -> None:
        """Starts the clock.

        Args:
            resources: resources of a teacher.
            num_teachers: number of teachers that must start.
            say: called with each line.
            free: returns the unused resources of the cluster, by ``CPU`` and ``GPU``.
        """
        self._needed = resources.replica()  # across nodes, as `free` is
        self._num_teachers = num_teachers
        self._say = say
        self._free = free
        self._started = time.monotonic()
        self._is_late = False
        self.is_over = False

    def update(self, is_up: bool) -> None:
        """Prints the line that is due, if any; call it regularly.

        Args:
            is_up: whether a teacher has started.
        """
        if self.is_over:
            return
        waited_s = time.monotonic() - self._started
        if is_up:
            self.is_over = True
            if self._is_late:
                self._say(f"a teacher started after {duration_text(waited_s)}")
        elif waited_s >= DELAY_S and not self._is_late:
            self._is_late = True
            self._say(self._waiting_line(self._free()))

    def _waiting_line(self, free: Mapping[str, float]) -> str:
        teachers = "teacher" if self._num_teachers == 1 else "teachers"
        has_room = all(free.get(kind, 0.0) >= amount for kind, amount in self._needed.items())
        cause = "other jobs, or teachers that are still starting, use the rest"
        if has_room:
            cause = "it is still starting, or no single node has that much free"
        return (
            f"waiting for {self._num_teachers} {teachers} of {_amounts(self._needed)}: "
            f"the cluster has {_amounts(free)} free; {cause}"
        )


def _amounts(amounts: Mapping[str, float]) -> str:
    return ", ".join(f"{amounts.get(kind, 0.0):g} {kind}" for kind in ("CPU", "GPU"))
