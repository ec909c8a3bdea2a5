"""CPU threads that share the slices of a batch, each with one torch thread and its own memory.

torch splits every small operation across all cores and each time waits for the slowest. If some
cores also write earlier units or run other programs, that wait is many times longer than the
operation. Here slices are queued, busy cores take fewer of them, and the only wait is for the last
slice.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from labeler.label_head.buffers import SliceBuffers

_Result = TypeVar("_Result")


class SlicePool:
    """As many threads as torch has on a CPU; none if it has one, or on another device.

    Created and used by one thread.
    """

    def __init__(self, device: torch.device) -> None:
        self.num_threads = torch.get_num_threads() if device.type == "cpu" else 1
        self._buffers = SliceBuffers()
        self._local = threading.local()
        self._pool: ThreadPoolExecutor | None = None

    def map(
        self, function: Callable[[slice, SliceBuffers], _Result], slices: Sequence[slice]
    ) -> list[_Result]:
        """Applies a function to all slices; returns results in order, propagates its errors."""
        if self.num_threads == 1 or len(slices) == 1:
            return [function(one, self._buffers) for one in slices]
        if self._pool is None:
            self._pool = self._start()
        # Inference mode is thread-local.
        inference = torch.is_inference_mode_enabled()

        def run(one: slice) -> _Result:
            with torch.inference_mode(inference):
                return function(one, self._local.buffers)

        return list(self._pool.map(run, slices))

    def _start(self) -> ThreadPoolExecutor:
        ready = threading.Barrier(self.num_threads + 1)

        def initialize() -> None:
            torch.set_num_threads(1)
            self._local.buffers = SliceBuffers()
            ready.wait()

        pool = ThreadPoolExecutor(self.num_threads, "label-slices", initializer=initialize)
        for _ in range(self.num_threads):
            pool.submit(int)
        ready.wait()
        # set_num_threads acts on the calling thread, but also sets the default of later threads.
        torch.set_num_threads(self.num_threads)
        return pool
