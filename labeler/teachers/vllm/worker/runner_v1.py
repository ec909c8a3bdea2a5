"""The label head inside vLLM's V1 model runner.

Replaces ``GPUModelRunner._get_prompt_logprobs_dict``: collects the positions to label of all
requests of a step, computes logits for a few hundred at a time, and keeps the record's numbers
only. Written against vLLM 0.32; tested on CPUs, and the same runner serves GPUs.

Alignment: the hidden state at position t - 1 gives the distribution over the token at t.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from labeler.label_head.thread_pool import SlicePool
from labeler.teachers.vllm.label_requests import AUDIT_RATE, ROW_KEY, SPANS
from labeler.teachers.vllm.patches import DiscardedSamples
from labeler.teachers.vllm.worker.label_step import label_step
from labeler.teachers.vllm.worker.request_state import Chunk, RequestState, joined
from labeler.teachers.vllm.worker.tensor_parallel import vocab_parallel_logits
from schemas.record.spans import span_targets
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
    """Puts a label head into a V1 model runner; one already there serves the new record.

    Returns:
        How the runner differs from what is expected, in which case nothing is changed; else "".
    """
    complaint = _complaint(runner)
    installed = getattr(getattr(runner, "_get_prompt_logprobs_dict", None), "__self__", None)
    if isinstance(installed, _LabelHead):
        installed.record = record
    elif not complaint:
        shim = DiscardedSamples(runner)
        head = _LabelHead(runner, record, shim.restore)
        runner._sample = shim.sample
        runner._get_prompt_logprobs_dict = head.step
    return complaint


def _complaint(runner: Any) -> str:
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
        self.record = record
        self._workers = SlicePool(runner.device)
        self._vocab_size = runner.model_config.get_vocab_size()
        self._shards = vocab_parallel_logits(runner.model)
        self._stock_step: Callable[..., dict[str, Any]] = runner._get_prompt_logprobs_dict

    def step(
        self, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]
    ) -> dict[str, Any]:
        """Labels what this step computed; see the method it replaces.

        Args:
            hidden_states: [tokens of the step, H], requests one after the other.
            num_scheduled_tokens: tokens of each request in this step.

        Returns:
            For each request whose prompt is now complete, its ``LogprobsTensors``.
        """
        self._on_step()
        pending: dict[str, int] = self._runner.num_prompt_logprobs
        ours = [name for name in pending if self._spans(name) is not None]
        finished = self._stock(pending, ours, hidden_states, num_scheduled_tokens)
        shares: list[Chunk] = []
        hidden_rows: list[np.ndarray] = []
        complete: list[str] = []
        for name in ours:
            if name not in num_scheduled_tokens:
                continue  # Preempted; it will come again from its first token.
            start = self._runner.requests[name].num_computed_tokens
            end = start + num_scheduled_tokens[name]
            share = self._share(name, start, end)
            if share.last > share.first:
                shares.append(share)
                hidden_rows.append(self._hidden_rows(name, share, start))
            if end >= len(self._runner.requests[name].prompt_token_ids):
                complete.append(name)
        if shares:
            targets = torch.from_numpy(joined(shares, "target_ids")).to(hidden_states.device)
            label_step(
                self._runner.model.compute_logits,
                self._shards,
                hidden_states,
                np.concatenate(hidden_rows),
                targets,
                shares,
                self.record,
                self._vocab_size,
                self._workers,
            )
        for name in complete:
            finished[name] = self._finish(name)
        return finished

    def _spans(self, name: str) -> list[int] | None:
        params = self._runner.requests[name].sampling_params
        spans: list[int] | None = (params.extra_args or {}).get(SPANS)
        return spans

    def _stock(
        self,
        pending: dict[str, int],
        ours: list[str],
        hidden_states: torch.Tensor,
        num_scheduled_tokens: dict[str, int],
    ) -> dict[str, Any]:
        """vLLM's own step, for the requests that are not ours."""
        if len(ours) == len(pending):
            return {}
        hidden = {name: pending.pop(name) for name in ours}
        finished = self._stock_step(hidden_states, num_scheduled_tokens)
        pending.update(hidden)
        return finished

    def _share(self, name: str, start: int, end: int) -> Chunk:
        """The targets of a request whose hidden states are those of positions [start, end)."""
        request = self._runner.requests[name]
        row = request.in_progress_prompt_logprobs_cpu
        if row is None:
            row = self._new_row(
                np.asarray(request.prompt_token_ids), request.sampling_params.extra_args
            )
            request.in_progress_prompt_logprobs_cpu = row
        first, last = np.searchsorted(row.targets, (start + 1, end + 1))
        return Chunk(row, int(first), int(last))

    def _new_row(self, token_ids: np.ndarray, arguments: dict[str, Any]) -> RequestState:
        return RequestState.of(
            token_ids,
            span_targets(np.asarray(arguments[SPANS])),
            bytes.fromhex(arguments[ROW_KEY]),
            arguments[AUDIT_RATE],
            self.record,
            self._vocab_size,
        )

    def _hidden_rows(self, name: str, share: Chunk, start: int) -> np.ndarray:
        offset = self._runner.query_start_loc.np[self._runner.input_batch.req_id_to_index[name]]
        rows: np.ndarray = share.row.targets[share.first : share.last] - 1 - start + offset
        return rows

    def _finish(self, name: str) -> Any:
        from vllm.v1.outputs import LogprobsTensors

        request = self._runner.requests[name]
        row: RequestState = request.in_progress_prompt_logprobs_cpu
        request.in_progress_prompt_logprobs_cpu = None
        del self._runner.num_prompt_logprobs[name]
        return LogprobsTensors(*row.packed)
