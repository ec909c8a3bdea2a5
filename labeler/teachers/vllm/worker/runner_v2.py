"""The label head inside vLLM's V2 model runner; see ``labeler.teachers.vllm.label_requests``.

The V2 runner keeps prompt log-probabilities in a separate worker object. Three of its methods are
replaced: ``add_request`` records the labelling arguments, ``compute_prompt_logprobs`` labels the
positions of a step, ``remove_request`` drops the state. Labels stay on the device until their
prompt is complete; the runner then copies them to the host asynchronously, like its own.

Written from the source of vLLM 0.32 (``vllm/v1/worker/gpu``) and never run inside that runner,
which needs a GPU. Tests run the bookkeeping on a CPU with the runner's own data structures, and
``install_into`` checks every name used and refuses a runner that differs.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from labeler.teachers.vllm.label_requests import SPANS
from labeler.teachers.vllm.worker.label_step import StepLabeler
from labeler.teachers.vllm.worker.request_state import Chunk, RequestState
from labeler.teachers.vllm.worker.tensor_parallel import vocab_parallel_logits
from schemas.spec import RecordSpec

_SIGNATURES = {
    "add_request": ("req_id", "req_idx", "sampling_params"),
    "remove_request": ("req_id",),
    "compute_prompt_logprobs": (
        "logits_fn",
        "hidden_states",
        "input_batch",
        "all_token_ids",
        "num_computed_tokens",
        "prompt_lens",
    ),
}
_WORKER_PARTS = ("device", "uses_prompt_logprobs", "in_progress_prompt_logprobs")
_BATCH_FIELDS = (
    "req_ids",
    "idx_mapping_np",
    "num_scheduled_tokens",
    "num_computed_prefill_tokens_np",
    "prefill_len_np",
    "query_start_loc_np",
)


def install_into(runner: Any, record: RecordSpec) -> str:
    """Puts a label head into a V2 model runner; a head already installed switches to the record.

    Returns:
        How the runner differs from the expected one, in which case nothing is changed; else "".
    """
    worker = runner.prompt_logprobs_worker
    if worker is None:
        # Only the last stage of a pipeline has hidden states to label.
        return "" if not getattr(runner, "is_last_pp_rank", True) else "it labels no prompts"
    installed = getattr(worker.compute_prompt_logprobs, "__self__", None)
    if isinstance(installed, LabelHeadV2):
        installed.labeler.record = record
        return ""
    complaint = incompatibility(worker)
    if not complaint:
        vocab_size = runner.model_config.get_vocab_size()
        parallel = vocab_parallel_logits(runner.model)
        labeler = StepLabeler(record, vocab_size, worker.device, parallel)
        LabelHeadV2(worker, labeler).install()
    return complaint


def incompatibility(worker: Any) -> str:
    """How a ``PromptLogprobsWorker`` differs from the expected one; empty if it does not."""
    from vllm.v1.worker.gpu.input_batch import InputBatch

    for name, expected in _SIGNATURES.items():
        method = getattr(worker, name, None)
        found = () if method is None else tuple(inspect.signature(method).parameters)
        if found != expected:
            return f"PromptLogprobsWorker.{name} takes {found}, expected {expected}"
    missing = [name for name in _WORKER_PARTS if not hasattr(worker, name)]
    fields = inspect.signature(InputBatch).parameters
    missing += [f"InputBatch.{name}" for name in _BATCH_FIELDS if name not in fields]
    return f"the V2 model runner lacks {', '.join(missing)}" if missing else ""


class LabelHeadV2:
    """Replaces methods of one ``PromptLogprobsWorker``."""

    def __init__(self, worker: Any, labeler: StepLabeler) -> None:
        self.labeler = labeler
        self._worker = worker
        self._wanted: dict[str, dict[str, Any]] = {}
        self._states: dict[str, RequestState] = {}
        self._stock_add: Callable[..., None] = worker.add_request
        self._stock_remove: Callable[..., None] = worker.remove_request
        self._stock_compute: Callable[..., dict[str, Any]] = worker.compute_prompt_logprobs

    def install(self) -> None:
        """Replaces the methods."""
        self._worker.add_request = self.add_request
        self._worker.remove_request = self.remove_request
        self._worker.compute_prompt_logprobs = self.compute_prompt_logprobs

    def add_request(self, req_id: str, req_idx: int, sampling_params: Any) -> None:
        """Records labelling arguments; hides labelling requests from the runner's own step."""
        self._forget(req_id)
        self._stock_add(req_id, req_idx, sampling_params)
        arguments = sampling_params.extra_args or {}
        if SPANS in arguments:
            self._wanted[req_id] = arguments
            self._worker.uses_prompt_logprobs[req_idx] = False
            self._worker.in_progress_prompt_logprobs.pop(req_id, None)

    def remove_request(self, req_id: str) -> None:
        """Drops the state of a finished request, or of a preempted one, which restarts."""
        self._forget(req_id)
        self._stock_remove(req_id)

    def _forget(self, req_id: str) -> None:
        self._wanted.pop(req_id, None)
        self._states.pop(req_id, None)

    def compute_prompt_logprobs(
        self,
        logits_fn: Callable[[torch.Tensor], torch.Tensor],
        hidden_states: torch.Tensor,
        input_batch: Any,
        all_token_ids: torch.Tensor,
        num_computed_tokens: torch.Tensor,
        prompt_lens: np.ndarray,
    ) -> dict[str, Any]:
        """Labels the positions that a step computed; see the method that it replaces.

        Returns:
            For each request whose prompt is now complete, its ``LogprobsTensors``, on the device.
        """
        from vllm.v1.outputs import LogprobsTensors

        finished = self._stock_compute(
            logits_fn, hidden_states, input_batch, all_token_ids, num_computed_tokens, prompt_lens
        )
        chunks: list[Chunk] = []
        target_ids: list[torch.Tensor] = []
        complete: list[str] = []
        for row, name in enumerate(input_batch.req_ids):
            slot = int(input_batch.idx_mapping_np[row])
            start = int(input_batch.num_computed_prefill_tokens_np[row])
            length = int(prompt_lens[slot])
            # A request preempted while generating prefills its output too, but has its labels.
            resumed = length < int(input_batch.prefill_len_np[row])
            if name not in self._wanted or start >= length or resumed:
                continue
            end = start + int(input_batch.num_scheduled_tokens[row])
            state = self._state(name, start, hidden_states.device)
            chunk = state.chunk(start, end, int(input_batch.query_start_loc_np[row]))
            if chunk is not None:
                chunks.append(chunk)
                at = torch.from_numpy(chunk.targets).to(hidden_states.device)
                target_ids.append(all_token_ids[slot].index_select(0, at))
            if end >= length:
                complete.append(name)
        if chunks:
            self.labeler.label(logits_fn, hidden_states, torch.cat(target_ids), chunks)
        for name in complete:
            finished[name] = LogprobsTensors(*self._states[name].packed)
            self._forget(name)
        return finished

    def _state(self, name: str, start: int, device: torch.device) -> RequestState:
        if start == 0:
            self._states[name] = self.labeler.new_state(self._wanted[name], device)
        # Labelling requests skip the prefix cache, so that every position has a hidden state.
        assert name in self._states, f"request {name} starts at {start}"
        return self._states[name]
