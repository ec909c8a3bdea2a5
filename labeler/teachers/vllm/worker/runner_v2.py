"""The label head inside vLLM's workers, for the V2 model runner; see ``vllm_label_head``.

The V2 runner keeps prompt log-probabilities in a worker object of its own, whose methods are
replaced here: ``add_request`` notes what a request wants, ``compute_prompt_logprobs`` labels what a
step computed, ``remove_request`` forgets. Labels stay on the device until their prompt is complete;
the runner copies them home without waiting, as it does with its own.

Written against the source of vLLM 0.32 (``vllm/v1/worker/gpu``). That runner needs a GPU, and none
was at hand: the arithmetic and the bookkeeping are tested on a CPU with the runner's own data
structures, the names by ``install_into``, which refuses a runner that is not as expected.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from labeler.label_head.thread_pool import SlicePool
from labeler.teachers.vllm.label_requests import AUDIT_RATE, ROW_KEY, SPANS
from labeler.teachers.vllm.worker.label_step import label_step
from labeler.teachers.vllm.worker.request_state import Chunk, RequestState
from labeler.teachers.vllm.worker.tensor_parallel import VocabParallelLogits, vocab_parallel_logits
from schemas.record.spans import span_targets
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
    """Puts a label head into a V2 model runner; one that is there serves the record from now on.

    Returns:
        What about the runner is not as expected, in which case nothing is changed; else nothing.
    """
    worker = runner.prompt_logprobs_worker
    if worker is None:
        # Only the last stage of a pipeline has hidden states to label.
        return "" if not getattr(runner, "is_last_pp_rank", True) else "it labels no prompts"
    installed = getattr(worker.compute_prompt_logprobs, "__self__", None)
    if isinstance(installed, LabelHeadV2):
        installed.record = record
        return ""
    complaint = incompatibility(worker)
    if not complaint:
        vocab_size = runner.model_config.get_vocab_size()
        LabelHeadV2(worker, vocab_size, record, vocab_parallel_logits(runner.model)).install()
    return complaint


def incompatibility(worker: Any) -> str:
    """What about a runner's ``PromptLogprobsWorker`` is not as expected; empty: nothing."""
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
    """Takes the place of the methods of one ``PromptLogprobsWorker``."""

    def __init__(
        self, worker: Any, vocab_size: int, record: RecordSpec, shards: VocabParallelLogits | None
    ) -> None:
        self.record = record
        self._worker = worker
        self._vocab_size = vocab_size
        self._shards = shards
        self._workers = SlicePool(worker.device)
        self._wanted: dict[str, dict[str, Any]] = {}
        self._rows: dict[str, RequestState] = {}
        self._stock_add: Callable[..., None] = worker.add_request
        self._stock_remove: Callable[..., None] = worker.remove_request
        self._stock_compute: Callable[..., dict[str, Any]] = worker.compute_prompt_logprobs

    def install(self) -> None:
        """Replaces the methods."""
        self._worker.add_request = self.add_request
        self._worker.remove_request = self.remove_request
        self._worker.compute_prompt_logprobs = self.compute_prompt_logprobs

    def add_request(self, req_id: str, req_idx: int, sampling_params: Any) -> None:
        """Notes what a request wants; the runner's own step does not see one of ours."""
        self._forget(req_id)
        self._stock_add(req_id, req_idx, sampling_params)
        arguments = sampling_params.extra_args or {}
        if SPANS in arguments:
            self._wanted[req_id] = arguments
            self._worker.uses_prompt_logprobs[req_idx] = False
            self._worker.in_progress_prompt_logprobs.pop(req_id, None)

    def remove_request(self, req_id: str) -> None:
        """Forgets a request that is finished, or preempted: that comes again from its start."""
        self._forget(req_id)
        self._stock_remove(req_id)

    def _forget(self, req_id: str) -> None:
        self._wanted.pop(req_id, None)
        self._rows.pop(req_id, None)

    def compute_prompt_logprobs(
        self,
        logits_fn: Callable[[torch.Tensor], torch.Tensor],
        hidden_states: torch.Tensor,
        input_batch: Any,
        all_token_ids: torch.Tensor,
        num_computed_tokens: torch.Tensor,
        prompt_lens: np.ndarray,
    ) -> dict[str, Any]:
        """Labels what a step computed; see the method that it replaces.

        Returns:
            For each request whose prompt is now complete, its ``LogprobsTensors``, on the device.
        """
        from vllm.v1.outputs import LogprobsTensors

        finished = self._stock_compute(
            logits_fn, hidden_states, input_batch, all_token_ids, num_computed_tokens, prompt_lens
        )
        shares: list[Chunk] = []
        hidden_rows: list[np.ndarray] = []
        target_ids: list[torch.Tensor] = []
        complete: list[str] = []
        for place, name in enumerate(input_batch.req_ids):
            slot = int(input_batch.idx_mapping_np[place])
            start = int(input_batch.num_computed_prefill_tokens_np[place])
            length = int(prompt_lens[slot])
            resumed = length < int(input_batch.prefill_len_np[place])  # labelled before that
            if name not in self._wanted or start >= length or resumed:
                continue
            end = start + int(input_batch.num_scheduled_tokens[place])
            row = self._row(name, start, hidden_states.device)
            first, last = np.searchsorted(row.targets, (start + 1, end + 1))
            if last > first:
                targets = row.targets[first:last]
                shares.append(Chunk(row, int(first), int(last)))
                offset = int(input_batch.query_start_loc_np[place])
                hidden_rows.append(targets - 1 - start + offset)
                at = torch.from_numpy(targets).to(hidden_states.device)
                target_ids.append(all_token_ids[slot].index_select(0, at))
            if end >= length:
                complete.append(name)
        if shares:
            label_step(
                logits_fn,
                self._shards,
                hidden_states,
                np.concatenate(hidden_rows),
                torch.cat(target_ids),
                shares,
                self.record,
                self._vocab_size,
                self._workers,
            )
        for name in complete:
            finished[name] = LogprobsTensors(*self._rows[name].packed)
            self._forget(name)
        return finished

    def _row(self, name: str, start: int, device: torch.device) -> RequestState:
        if start == 0:
            arguments = self._wanted[name]
            self._rows[name] = RequestState.of(
                None,
                span_targets(np.asarray(arguments[SPANS])),
                bytes.fromhex(arguments[ROW_KEY]),
                arguments[AUDIT_RATE],
                self.record,
                self._vocab_size,
                device,
            )
        # Requests of ours read no prefix cache, so that every position has a hidden state.
        assert name in self._rows, f"request {name} starts at {start}"
        return self._rows[name]
