"""The label head inside vLLM's V1 model runner.

Replaces ``GPUModelRunner._get_prompt_logprobs_dict``: collects the target positions of all requests
of a step, computes logits for a few hundred at a time, and keeps only the fields of the record.
Written against vLLM 0.32 and tested on CPUs; the same runner serves GPUs.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from labeler.teachers.vllm.label_requests import SPANS
from labeler.teachers.vllm.patches import DiscardedSamples
from labeler.teachers.vllm.worker.label_step import StepLabeler
from labeler.teachers.vllm.worker.request_state import Chunk, RequestState
from labeler.teachers.vllm.worker.tensor_parallel import vocab_parallel_logits
from schemas.spec import RecordSpec

_RUNNER_PARTS = (
    "num_prompt_logprobs",
    "requests",
    "input_batch",
    "query_start_loc",
    "model",
    "model_config",
    "discard_request_mask",
    "_sample",
    "device",
)
_STEP_PARAMETERS = ("hidden_states", "num_scheduled_tokens")


def install_into(runner: Any, record: RecordSpec) -> str:
    """Puts a label head into a V1 model runner; a head already installed switches to the record.

    Returns:
        How the runner differs from the expected one, in which case nothing is changed; else "".
    """
    complaint = _incompatibility(runner)
    installed = getattr(getattr(runner, "_get_prompt_logprobs_dict", None), "__self__", None)
    if isinstance(installed, _LabelHead):
        installed.labeler.record = record
    elif not complaint:
        patch = DiscardedSamples(runner)
        head = _LabelHead(runner, record, patch.restore)
        runner._sample = patch.sample
        runner._get_prompt_logprobs_dict = head.step
    return complaint


def _incompatibility(runner: Any) -> str:
    step = getattr(runner, "_get_prompt_logprobs_dict", None)
    if step is None:
        return f"the model runner {type(runner).__qualname__} has no _get_prompt_logprobs_dict"
    parameters = tuple(inspect.signature(step).parameters)
    if parameters != _STEP_PARAMETERS:
        return f"_get_prompt_logprobs_dict takes {parameters}, expected {_STEP_PARAMETERS}"
    missing = [name for name in _RUNNER_PARTS if not hasattr(runner, name)]
    if missing:
        return f"the model runner lacks {', '.join(missing)}"
    missing += [] if hasattr(runner.query_start_loc, "np") else ["query_start_loc.np"]
    missing += [] if hasattr(runner.model, "compute_logits") else ["model.compute_logits"]
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

    state = inspect.signature(CachedRequestState).parameters
    fields = ("prompt_token_ids", "num_computed_tokens", "in_progress_prompt_logprobs_cpu")
    missing += [f"request.{name}" for name in (*fields, "sampling_params") if name not in state]
    return f"the model runner lacks {', '.join(missing)}" if missing else ""


class _LabelHead:
    """Replaces ``GPUModelRunner._get_prompt_logprobs_dict`` of one worker."""

    def __init__(self, runner: Any, record: RecordSpec, on_step: Callable[[], None]) -> None:
        self._runner = runner
        self._on_step = on_step
        vocab_size = runner.model_config.get_vocab_size()
        parallel = vocab_parallel_logits(runner.model)
        self.labeler = StepLabeler(record, vocab_size, runner.device, parallel)
        self._stock_step: Callable[..., dict[str, Any]] = runner._get_prompt_logprobs_dict

    def step(
        self, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]
    ) -> dict[str, Any]:
        """Labels the positions that this step computed; see the method it replaces.

        Args:
            hidden_states: [tokens of the step, H], requests one after the other.
            num_scheduled_tokens: tokens of each request in this step.

        Returns:
            For each request whose prompt is now complete, its ``LogprobsTensors``.
        """
        self._on_step()
        pending: dict[str, int] = self._runner.num_prompt_logprobs
        ours = [name for name in pending if self._extra_args(name).get(SPANS) is not None]
        finished = self._run_stock_step(pending, ours, hidden_states, num_scheduled_tokens)
        chunks: list[Chunk] = []
        target_ids: list[np.ndarray] = []
        complete: list[str] = []
        for name in ours:
            if name not in num_scheduled_tokens:
                continue  # preempted; it restarts from its first token
            request = self._runner.requests[name]
            start = request.num_computed_tokens
            end = start + num_scheduled_tokens[name]
            row = self._runner.input_batch.req_id_to_index[name]
            chunk = self._state(name).chunk(start, end, self._runner.query_start_loc.np[row])
            if chunk is not None:
                chunks.append(chunk)
                following = np.asarray(request.prompt_token_ids[start + 1 : end + 1])
                target_ids.append(following[chunk.targets - start - 1])
            if end >= len(request.prompt_token_ids):
                complete.append(name)
        if chunks:
            targets = torch.from_numpy(np.concatenate(target_ids))
            self.labeler.label(self._runner.model.compute_logits, hidden_states, targets, chunks)
        for name in complete:
            finished[name] = self._finish(name)
        return finished

    def _extra_args(self, name: str) -> dict[str, Any]:
        return self._runner.requests[name].sampling_params.extra_args or {}

    def _run_stock_step(
        self,
        pending: dict[str, int],
        ours: list[str],
        hidden_states: torch.Tensor,
        num_scheduled_tokens: dict[str, int],
    ) -> dict[str, Any]:
        """Runs vLLM's own step for the requests that the label head does not serve."""
        if len(ours) == len(pending):
            return {}
        hidden = {name: pending.pop(name) for name in ours}
        finished = self._stock_step(hidden_states, num_scheduled_tokens)
        pending.update(hidden)
        return finished

    def _state(self, name: str) -> RequestState:
        # Stored with the request, like vLLM's own state. A preempted request refills it.
        request = self._runner.requests[name]
        if request.in_progress_prompt_logprobs_cpu is None:
            request.in_progress_prompt_logprobs_cpu = self.labeler.new_state(self._extra_args(name))
        state: RequestState = request.in_progress_prompt_logprobs_cpu
        return state

    def _finish(self, name: str) -> Any:
        from vllm.v1.outputs import LogprobsTensors

        tensors = LogprobsTensors(*self._state(name).packed)
        self._runner.requests[name].in_progress_prompt_logprobs_cpu = None
        del self._runner.num_prompt_logprobs[name]
        return tensors
