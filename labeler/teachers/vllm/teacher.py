"""The fast teacher: vLLM, with the label head in its workers.

The engine is driven request by request (``add_request`` and ``step``), not through
``LLM.generate``, which aborts a full batch over one invalid prompt. One thread drives it for all
calls (``engine_thread``); building requests and reading results happens on the thread of each call.
"""

import importlib.metadata
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from labeler.config import TeacherConfig
from labeler.teacher_model.identity import eos_ids
from labeler.teachers.protocol import OnRow, RowLabels, ignore_row, usable_or_failure
from labeler.teachers.request_checks import ModelLimits
from labeler.teachers.topk_candidates import LIMITS
from labeler.teachers.vllm import label_requests, stock_logprobs
from labeler.teachers.vllm.engine_options import (
    STOCK_CANDIDATES,
    engine_options,
    prepare_environment,
)
from labeler.teachers.vllm.engine_thread import EngineRequest, EngineThread
from schemas.errors import RowFailure, TeacherError
from schemas.record.spans import span_targets
from schemas.spec import GenerationSpec, RecordSpec


class VllmTeacher:
    """A model run by vLLM, on GPUs or a CPU; see ``labeler.teachers.protocol.Teacher``.

    ``teacher.engine`` is passed to ``vllm.LLM``.
    """

    shareable: ClassVar[bool] = True

    # Engines in one process would share its communication groups, which the first to stop destroys.
    _engine_is_here: ClassVar[bool] = False

    def __init__(self, config: TeacherConfig, record: RecordSpec) -> None:
        self._config = config
        self._record = record
        self._limits = ModelLimits.load(config)
        self._eos_ids = eos_ids(config)
        self._options = engine_options(config, self._limits.context, record)
        self._stock_reason = ""  # why labels come from vLLM's own log-probabilities, if they do
        self._llm: Any = None
        self._runners: list[str] = []
        self._in_process = False
        self._engine = EngineThread()
        try:
            self._engine.alone(self._start)
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        prepare_environment()
        try:
            from vllm import LLM
        except ImportError as error:
            raise TeacherError(
                f"teacher.backend is vllm, but it cannot be imported ({error}); install "
                'tutelage[gpu] or tutelage[cpu], or use teacher.backend = "transformers"'
            ) from error
        self._in_process = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"
        if self._in_process and VllmTeacher._engine_is_here:
            raise TeacherError(
                "this process already runs a vLLM engine; close that teacher first, or set "
                "VLLM_ENABLE_V1_MULTIPROCESSING=1 to give each engine a process of its own"
            )
        try:
            self._llm = LLM(**self._options)
        except Exception as error:
            raise TeacherError(
                f"vLLM does not start with teacher.model = {self._config.model}: {error}"
            ) from error
        VllmTeacher._engine_is_here |= self._in_process
        self._install_label_path()
        self._engine.engine = self._llm.llm_engine

    def _install_label_path(self) -> None:
        """Puts the label head into the workers, or falls back to vLLM's own log-probabilities.

        Raises:
            TeacherError: The head does not fit, and the record needs it.
        """
        unsupported = ", ".join(self._record.needs_beyond_topk())
        if self._config.label_path == "flat":
            if unsupported:
                raise TeacherError(
                    'teacher.label_path = "flat" serves records of kind topk without entropy and '
                    f"temperatures; the label set has {unsupported}"
                )
            self._stock_reason = 'teacher.label_path = "flat"'
        else:
            try:
                self._runners = label_requests.install(self._llm, self._record)
                self._stock_reason = ""
                return
            except TeacherError as error:
                if self._config.label_path == "head" or unsupported:
                    raise
                self._stock_reason = str(error)
        allowed = self._options.get("max_logprobs", STOCK_CANDIDATES)
        if 0 <= allowed < self._record.k:
            raise TeacherError(
                f"vLLM returns at most {allowed} log-probabilities per position "
                "(teacher.engine.max_logprobs), but the label set has record.k = "
                f"{self._record.k}; raise max_logprobs ({self._stock_reason})"
            )

    def label(
        self,
        token_ids: Sequence[np.ndarray],
        label_spans: Sequence[np.ndarray],
        row_keys: np.ndarray,
        audit_rate: float = 0.0,
        on_row: OnRow = ignore_row,
    ) -> list[RowLabels | RowFailure]:
        """See ``Teacher.label``."""
        results = self._limits.refuse_requests(token_ids, label_spans)
        rows = [row for row, refused in enumerate(results) if refused is None]
        requests = [
            self._label_request(token_ids[row], label_spans[row], row_keys[row], audit_rate)
            for row in rows
        ]
        outputs = self._engine.outputs(requests, lambda index: on_row(rows[index]))
        for row, output in zip(rows, outputs, strict=True):
            if isinstance(output, RowFailure):
                results[row] = output
            else:
                arguments = token_ids[row], label_spans[row], row_keys[row], audit_rate
                results[row] = usable_or_failure(self._read_labels(output, *arguments))
        return [result for result in results if result is not None]

    def _label_request(
        self, token_ids: np.ndarray, spans: np.ndarray, row_key: np.ndarray, audit_rate: float
    ) -> EngineRequest:
        if self._stock_reason:
            num_candidates = min(self._record.k, self._limits.vocab_size)
            return engine_request(token_ids, stock_logprobs.stock_params(num_candidates))
        params = label_requests.label_params(spans, row_key, audit_rate)
        return engine_request(token_ids, params, label_requests.keep_arrays)

    def _read_labels(
        self,
        output: Any,
        token_ids: np.ndarray,
        spans: np.ndarray,
        row_key: np.ndarray,
        audit_rate: float,
    ) -> RowLabels:
        if self._stock_reason:
            return stock_logprobs.stock_row_labels(
                output, token_ids, spans, self._record, self._limits.vocab_size
            )
        num_labels = int((spans[1::2] - spans[::2]).sum())
        return label_requests.row_labels(output, self._record, num_labels, row_key, audit_rate)

    def stock_logprobs(
        self,
        token_ids: Sequence[np.ndarray],
        label_spans: Sequence[np.ndarray],
        entry_ids: Sequence[np.ndarray],
    ) -> list[np.ndarray | RowFailure]:
        """vLLM's own log-probabilities of given ids, for a few rows.

        Returns:
            float64 [N, K] per row, nats; NaN for ids that are not among vLLM's candidates. A row
            that vLLM refuses is a ``RowFailure``.

        Raises:
            TeacherError: The engine failed.
        """
        num_candidates = self._options.get("max_logprobs", STOCK_CANDIDATES)
        params = stock_logprobs.stock_params(num_candidates)
        outputs = self._engine.outputs([engine_request(tokens, params) for tokens in token_ids])
        return [
            output
            if isinstance(output, RowFailure)
            else stock_logprobs.stock_entry_logprobs(output, span_targets(spans), ids)
            for output, spans, ids in zip(outputs, label_spans, entry_ids, strict=True)
        ]

    def generate(
        self,
        prompt_ids: Sequence[np.ndarray],
        generation: GenerationSpec,
        seeds: Sequence[Sequence[int]],
        on_row: OnRow = ignore_row,
    ) -> list[list[np.ndarray] | RowFailure]:
        """See ``Teacher.generate``. All samples of all prompts form one batch for the engine."""
        results: list[list[np.ndarray] | RowFailure] = []
        requests: list[EngineRequest] = []
        rows: list[int] = []
        for row, (prompt, prompt_seeds) in enumerate(zip(prompt_ids, seeds, strict=True)):
            refused = self._limits.refuse_generation(prompt, generation.max_tokens)
            results.append(refused or [])
            for seed in prompt_seeds if refused is None else ():
                requests.append(engine_request(prompt, self._sampling_params(generation, seed)))
                rows.append(row)
        outputs = self._engine.outputs(requests, lambda index: on_row(rows[index]))
        for row, output in zip(rows, outputs, strict=True):
            samples = results[row]
            if isinstance(output, RowFailure):
                results[row] = output
            elif not isinstance(samples, RowFailure):
                samples.append(np.array(output.outputs[0].token_ids, dtype=np.int32))
        return results

    def _sampling_params(self, generation: GenerationSpec, seed: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=generation.temperature,
            top_p=generation.top_p,
            max_tokens=generation.max_tokens,
            seed=seed,
            stop_token_ids=list(self._eos_ids),
            detokenize=False,
        )

    def provenance(self) -> dict[str, object]:
        """See ``Teacher.provenance``."""
        distribution = label_requests.vllm_distribution()
        return {
            "backend": "vllm",
            "model": self._config.model,
            "vllm": f"{distribution} {importlib.metadata.version(distribution)}",
            "torch": importlib.metadata.version("torch"),
            "model_runner": ", ".join(sorted(set(self._runners))),
            "in_process": self._in_process,
            **self._path_facts(),
            "engine": {name: _json_value(value) for name, value in self._options.items()},
        }

    def _path_facts(self) -> dict[str, object]:
        """The label path, and the limits of labels from vLLM's own log-probabilities."""
        if not self._stock_reason:
            return {"label_path": "head"}
        announcement = (
            f"labels are vLLM's own log-probabilities, without audits: {self._stock_reason}"
        )
        return {"label_path": "flat", "announcement": announcement, **LIMITS}

    def wake(self) -> None:
        """Fails the calls that wait for an engine whose process has died."""
        from labeler.teachers.vllm.patches import fail_waiting

        fail_waiting(self._llm)

    def close(self) -> None:
        """See ``Teacher.close``."""
        self._engine.close(self._stop)

    def _stop(self) -> None:
        if self._llm is None:
            return
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        if self._in_process:
            from vllm.distributed import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()
            VllmTeacher._engine_is_here = False


def engine_request(
    token_ids: np.ndarray, params: Any, prepare: Callable[[Any, str], None] | None = None
) -> EngineRequest:
    """A request for token ids, integer [L], with vLLM's sampling parameters."""
    from vllm.inputs import tokens_input

    return EngineRequest(tokens_input(token_ids.tolist()), params, prepare)


def _json_value(value: Any) -> object:
    """The value if JSON can represent it, else its text."""
    return value if isinstance(value, bool | int | float | str | None) else str(value)
