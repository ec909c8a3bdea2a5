"""Threads of a CPU that share the slices of a batch, each with one torch thread and its own memory.

torch's own way is to divide every small operation among all cores and to wait for the slowest of
them each time. Cores that also write earlier units to the disk, or serve other programs, make that
wait many times longer than the operation. Here the slices wait in a queue, a core that is held up
takes fewer of them, and they are waited for once.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from labeler.label_head.buffers import BufferCache

_Result = TypeVar("_Result")


class SlicePool:
    """As many threads as torch has, or none where it has one or the work is not a CPU's.

    Made and used by one thread.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = torch.get_num_threads() if device.type == "cpu" else 1
        self._scratch = BufferCache()
        self._own = threading.local()
        self._pool: ThreadPoolExecutor | None = None

    def each(
        self, function: Callable[[slice, BufferCache], _Result], slices: Sequence[slice]
    ) -> list[_Result]:
        """The results of a function for all slices, in order; raises what it raises."""
        if self.count == 1 or len(slices) == 1:
            return [function(one, self._scratch) for one in slices]
        if self._pool is None:
            self._pool = self._started()
        inference = torch.is_inference_mode_enabled()  # of a thread, like the number of threads

        def run(one: slice) -> _Result:
            with torch.inference_mode(inference):
                return function(one, self._own.scratch)

        return list(self._pool.map(run, slices))

    def _started(self) -> ThreadPoolExecutor:
        ready = threading.Barrier(self.count + 1)

        def start() -> None:
            torch.set_num_threads(1)
            self._own.scratch = BufferCache()
            ready.wait()

        pool = ThreadPoolExecutor(self.count, "label-slices", initializer=start)
        for _ in range(self.count):
            pool.submit(int)
        ready.wait()
        # What a thread sets is for itself, but becomes what threads start with that come later.
        torch.set_num_threads(self.count)
        return pool
