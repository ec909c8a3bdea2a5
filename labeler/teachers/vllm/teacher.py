"""The teacher that labels at speed: vLLM, with the label head in its workers.

The engine is driven request by request (``add_request`` and ``step``), not through
``LLM.generate``, which aborts a whole batch over one prompt that it does not like. One thread does
that for all calls (``engine_thread``); what a call's own thread can do, it does: making requests,
and reading what comes back.
"""

import importlib.metadata
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np

from labeler.config import TeacherConfig
from labeler.teacher_model.identity import (
    context_tokens,
    eos_ids,
    load_model_config,
    model_vocab_size,
)
from labeler.teachers.protocol import OnRow, RowLabels, ignore_row, usable_or_failure
from labeler.teachers.request_checks import refuse_generation, refuse_request
from labeler.teachers.topk_candidates import LIMITS, unsupported_by_topk
from labeler.teachers.vllm import label_requests
from labeler.teachers.vllm.engine_options import (
    STOCK_CANDIDATES,
    engine_options,
    prepare_environment,
)
from labeler.teachers.vllm.engine_thread import EngineRequest, EngineThread
from labeler.teachers.vllm.stock_logprobs import stock_params, stock_row_labels
from schemas.errors import RowFailure, TeacherError
from schemas.record.spans import span_targets
from schemas.spec import GenerationSpec, RecordSpec

_Result = TypeVar("_Result")


class VllmTeacher:
    """A model run by vLLM, on GPUs or a CPU; see ``labeler.teachers.protocol.Teacher``.

    ``teacher.engine`` is passed to ``vllm.LLM``.
    """

    shareable: ClassVar[bool] = True

    # Engines of one process would share its communication groups, and the first to end ends them.
    _engine_is_here: ClassVar[bool] = False

    def __init__(self, config: TeacherConfig, record: RecordSpec) -> None:
        self._config = config
        self._record = record
        model_config = load_model_config(config)
        self._vocab_size = model_vocab_size(model_config)
        self._context = context_tokens(config)
        self._eos_ids = eos_ids(config)
        self._options = engine_options(config, self._context, record)
        self._flat_because = ""
        self._llm: Any = None
        self._runners: list[str] = []
        self._in_process = False
        self._engine = EngineThread()
        try:
            self._on_engine_thread(self._start)
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
            raise TeacherError(f"vLLM does not start with {self._config.model}: {error}") from error
        VllmTeacher._engine_is_here |= self._in_process
        self._install_path()
        self._engine.engine = self._llm.llm_engine

    def _install_path(self) -> None:
        """Puts the label head into the workers, or falls back to vLLM's own path.

        Raises:
            TeacherError: The head does not fit, and the record cannot be had without it.
        """
        beyond = unsupported_by_topk(self._record)
        if self._config.label_path == "flat":
            if beyond:
                raise TeacherError(
                    'teacher.label_path = "flat" serves records of kind topk without entropy and '
                    f"temperatures; the label set has {beyond}"
                )
            self._flat_because = 'teacher.label_path = "flat"'
            self._check_candidates()
            return
        try:
            self._runners = label_requests.install(self._llm, self._record)
            self._flat_because = ""
        except TeacherError as error:
            if self._config.label_path == "head" or beyond:
                raise
            self._flat_because = str(error)
            self._check_candidates()

    def _check_candidates(self) -> None:
        allowed = self._options.get("max_logprobs", STOCK_CANDIDATES)
        if 0 <= allowed < self._record.k:
            raise TeacherError(
                f"vLLM's own path tells {allowed} candidates (teacher.engine.max_logprobs), the "
                f"label set has record.k = {self._record.k}; raise it ({self._flat_because})"
            )

    def _on_engine_thread(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """Runs a function that has the engine for itself."""
        return self._engine.alone(function, *arguments)

    def label(
        self,
        token_ids: Sequence[np.ndarray],
        label_spans: Sequence[np.ndarray],
        row_keys: np.ndarray,
        audit_rate: float = 0.0,
        on_row: OnRow = ignore_row,
    ) -> list[RowLabels | RowFailure]:
        """See ``Teacher.label``."""
        results: dict[int, RowLabels | RowFailure] = {}
        requests: dict[int, EngineRequest] = {}
        for row, (tokens, spans, key) in enumerate(
            zip(token_ids, label_spans, row_keys, strict=True)
        ):
            refused = refuse_request(tokens, spans, self._vocab_size, self._context)
            if refused is not None:
                results[row] = refused
            elif self._flat_because:
                requests[row] = engine_request(tokens, stock_params(self._record, self._vocab_size))
            else:
                params = label_requests.label_params(spans, key, audit_rate)
                requests[row] = engine_request(tokens, params, label_requests.keep_arrays)
        rows = list(requests)
        outputs = self._engine.outputs(list(requests.values()), lambda place: on_row(rows[place]))
        for row, output in zip(rows, outputs, strict=True):
            if isinstance(output, RowFailure):
                results[row] = output
                continue
            if self._flat_because:
                labels = stock_row_labels(
                    output, token_ids[row], label_spans[row], self._record, self._vocab_size
                )
            else:
                num_labels = int((label_spans[row][1::2] - label_spans[row][::2]).sum())
                labels = label_requests.row_labels(
                    output, self._record, num_labels, row_keys[row], audit_rate
                )
            results[row] = usable_or_failure(labels)
        return [results[row] for row in range(len(token_ids))]

    def use_record(self, record: RecordSpec) -> None:
        """Labels by another record from now on; engines are slow to start."""
        before, self._record = self._record, record
        try:
            self._on_engine_thread(self._install_path)
        except TeacherError:
            self._record = before
            raise

    def stock_logprobs(
        self,
        token_ids: Sequence[np.ndarray],
        label_spans: Sequence[np.ndarray],
        entry_ids: Sequence[np.ndarray],
    ) -> list[np.ndarray | RowFailure]:
        """Log-probabilities of given ids by vLLM's own path, for a few rows.

        Returns:
            float64 [N, K] a row, nats; NaN for ids that are not among its candidates. A row that
            vLLM refuses is a ``RowFailure``.

        Raises:
            TeacherError: The engine failed.
        """
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=self._options.get("max_logprobs", STOCK_CANDIDATES),
            flat_logprobs=True,
            detokenize=False,
        )
        outputs = self._engine.outputs([engine_request(tokens, params) for tokens in token_ids])
        found: list[np.ndarray | RowFailure] = []
        for output, spans, ids in zip(outputs, label_spans, entry_ids, strict=True):
            if isinstance(output, RowFailure):
                found.append(output)
                continue
            flat = output.prompt_logprobs
            values = np.full(ids.shape, np.nan)
            for label, target in enumerate(span_targets(spans)):
                here = slice(flat.start_indices[target], flat.end_indices[target])
                known = dict(zip(flat.token_ids[here], flat.logprobs[here], strict=True))
                values[label] = [known.get(int(one), np.nan) for one in ids[label]]
            found.append(values)
        return found

    def generate(
        self,
        prompt_ids: Sequence[np.ndarray],
        generation: GenerationSpec,
        seeds: Sequence[Sequence[int]],
        on_row: OnRow = ignore_row,
    ) -> list[list[np.ndarray] | RowFailure]:
        """See ``Teacher.generate``. All samples of all prompts are one batch for the engine."""
        results: list[list[np.ndarray] | RowFailure] = []
        requests: list[EngineRequest] = []
        places: list[tuple[int, int]] = []
        for row, (prompt, prompt_seeds) in enumerate(zip(prompt_ids, seeds, strict=True)):
            refused = refuse_generation(
                prompt, generation.max_tokens, self._vocab_size, self._context
            )
            results.append(refused or [np.zeros(0, dtype=np.int32)] * len(prompt_seeds))
            for sample, seed in enumerate(prompt_seeds if refused is None else ()):
                requests.append(engine_request(prompt, self._sampling_params(generation, seed)))
                places.append((row, sample))
        outputs = self._engine.outputs(requests, lambda place: on_row(places[place][0]))
        for (row, sample), output in zip(places, outputs, strict=True):
            samples = results[row]
            if isinstance(output, RowFailure):
                results[row] = output
            elif not isinstance(samples, RowFailure):
                samples[sample] = np.array(output.outputs[0].token_ids, dtype=np.int32)
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
            **self._announced(),
            "engine": {name: _plain(value) for name, value in self._options.items()},
        }

    def _announced(self) -> dict[str, object]:
        """What the labels lack where they are vLLM's own."""
        if not self._flat_because:
            return {"label_path": "head"}
        announcement = (
            f"labels are vLLM's own log-probabilities, without audits: {self._flat_because}"
        )
        return {"label_path": "flat", "announcement": announcement, **LIMITS}

    def wake(self) -> None:
        """Has the calls fail that wait for an engine whose process is gone."""
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
    """A request of token ids, integer [L], with vLLM's sampling parameters."""
    from vllm.inputs import tokens_input

    return EngineRequest(tokens_input(token_ids.tolist()), params, prepare)


def _plain(value: Any) -> object:
    """A value that JSON can hold."""
    return value if isinstance(value, bool | int | float | str | None) else str(value)
