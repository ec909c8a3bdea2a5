"""Workarounds for bugs of vLLM 0.32, each with the condition for its removal."""

import contextlib
from collections.abc import Callable
from concurrent.futures import InvalidStateError
from typing import Any

import numpy as np


def fail_waiting(llm: Any) -> None:
    """Makes calls in flight raise, for an ``LLM`` whose engine process has died.

    vLLM's monitor notices the death and stops the thread that would deliver outputs, which ends
    without telling the callers, so they wait forever (``SyncMPClient.process_outputs_socket`` in
    ``vllm/v1/engine/core_client.py``). Can go once that thread puts an error into the queue when
    it is told to stop.
    """
    core: Any = getattr(getattr(llm, "llm_engine", None), "engine_core", None)
    error = RuntimeError("the engine's process is gone")
    if hasattr(core, "outputs_queue"):
        core.outputs_queue.put_nowait(error)
    for future in list(getattr(core, "utility_results", {}).values()):
        with contextlib.suppress(InvalidStateError):  # answered meanwhile
            future.set_exception(error)


class DiscardedSamples:
    """Works around a bug of vLLM 0.32: seeded sampling and chunked prefill kill an engine on a CPU.

    The runner samples a token for a prompt that is not complete yet, throws it away, and winds the
    request's random generator back by an offset, which generators of a CPU do not have ("CPU
    Generator does not use offset"). Here, such a request has no generator while it is sampled
    for, so that there is nothing to wind back. Can go when the runner does not sample for
    incomplete prompts, or checks the kind of generator.
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
