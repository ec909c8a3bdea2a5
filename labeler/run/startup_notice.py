"""Says why nothing happens yet: no teacher has come up, most often since others have its GPUs."""

import time
from collections.abc import Callable, Mapping

from labeler.run.progress import duration
from labeler.run.resources import Resources

PATIENCE_S = 30.0
"""How long a teacher may take to come up before the people who watch are told what it waits for."""


class TeacherWait:
    """Looks whether teachers have come up; says two lines at most, and none where all goes well."""

    def __init__(
        self,
        resources: Resources,
        num_teachers: int,
        say: Callable[[str], None],
        free: Callable[[], Mapping[str, float]],
    ) -> None:
        """Prepares; the waiting begins now.

        Args:
            resources: Of a teacher.
            num_teachers: That are waited for.
            say: Gets the lines.
            free: Tells the CPUs and GPUs that nobody has, by ``CPU`` and ``GPU``.
        """
        self._needed = resources.replica()
        self._num_teachers = num_teachers
        self._say = say
        self._free = free
        self._started = time.monotonic()
        self._is_told = False
        self.is_over = False

    def look(self, is_up: bool) -> None:
        """To be called again and again until ``is_over``, with whether a teacher is up."""
        waited_s = time.monotonic() - self._started
        if is_up:
            self.is_over = True
            if self._is_told:
                self._say(f"a teacher is up after {duration(waited_s)}; the job goes on")
        elif waited_s >= PATIENCE_S and not self._is_told:
            self._say(self._line(self._free()))
            self._is_told = True

    def _line(self, free: Mapping[str, float]) -> str:
        teachers = "teacher" if self._num_teachers == 1 else "teachers"
        has_room = all(free.get(kind, 0.0) >= amount for kind, amount in self._needed.items())
        why = "other jobs, or teachers that are still starting, hold the rest"
        if has_room:
            why = "it is still starting, or no single node has that much free"
        return (
            f"waiting for {self._num_teachers} {teachers} of {_amounts(self._needed)}: "
            f"the cluster has {_amounts(free)} free; {why}"
        )


def _amounts(amounts: Mapping[str, float]) -> str:
    return ", ".join(f"{amounts.get(kind, 0.0):g} {kind}" for kind in ("CPU", "GPU"))
