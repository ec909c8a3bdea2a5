"""A workaround for vLLM 0.32: a call that waits for an engine whose process is gone waits for ever.

Its monitor notices that the process has died and stops the thread that would bring outputs, which
ends without a word to whoever waits for them. (``SyncMPClient.process_outputs_socket`` in
``vllm/v1/engine/core_client.py``; this can go once that thread puts an error into the queue when it
is told to stop.)
"""

import contextlib
from concurrent.futures import InvalidStateError
from typing import Any


def fail_waiting(llm: Any) -> None:
    """Has the calls in flight raise, for an ``LLM`` whose engine is a process that has died."""
    core: Any = getattr(getattr(llm, "llm_engine", None), "engine_core", None)
    error = RuntimeError("the engine's process is gone")
    if hasattr(core, "outputs_queue"):
        core.outputs_queue.put_nowait(error)
    for future in list(getattr(core, "utility_results", {}).values()):
        with contextlib.suppress(InvalidStateError):  # answered meanwhile
            future.set_exception(error)
