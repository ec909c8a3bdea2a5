"""Workarounds for bugs of vLLM 0.32, each with the condition for its removal."""

import contextlib
from collections.abc import Callable
from concurrent.futures import InvalidStateError
from typing import Any

import numpy as np


def fail_waiting(llm: Any) -> None:
    """Makes calls in flight raise, for an ``LLM`` whose engine process has died.

    vLLM's monitor notices the death and stops the thread that delivers outputs, which ends without
    notifying the callers, so they wait forever (``SyncMPClient.process_outputs_socket`` in
    ``vllm/v1/engine/core_client.py``). Can be removed once that thread puts an error into the queue
    when it is stopped.
    """
    core: Any = getattr(getattr(llm, "llm_engine", None), "engine_core", None)
    error = RuntimeError("the engine's process has died")
    if hasattr(core, "outputs_queue"):
        core.outputs_queue.put_nowait(error)
    for future in list(getattr(core, "utility_results", {}).values()):
        with contextlib.suppress(InvalidStateError):  # completed meanwhile
            future.set_exception(error)


class DiscardedSamples:
    """Works around a bug of vLLM 0.32: seeded sampling with chunked prefill crashes a CPU engine.

    The runner samples a token for an incomplete prompt, discards it, and rewinds the request's
    random generator by an offset, which CPU generators lack ("CPU Generator does not use offset").
    Here such a request has no generator during sampling, so there is nothing to rewind. Can be
    removed when the runner skips incomplete prompts or checks the generator's device.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._stock_sample: Callable[..., Any] = runner._sample
        self._hidden: dict[int, Any] = {}

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        batch = self._runner.input_batch
        incomplete = np.flatnonzero(self._runner.discard_request_mask.np[: batch.num_reqs])
        for index in incomplete.tolist():
            if index in batch.generators:
                self._hidden[index] = batch.generators.pop(index)
        return self._stock_sample(*args, **kwargs)

    def restore(self) -> None:
        self._runner.input_batch.generators.update(self._hidden)
        self._hidden.clear()
