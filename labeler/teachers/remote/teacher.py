"""A teacher behind a vLLM server, through its OpenAI-compatible HTTP API.

For teachers too large to start in each job. The API returns the most probable ids of each
position of a prompt, so such a teacher serves records of kind ``topk`` without entropy; draws and
normalisers at other temperatures need the full distribution, which no server sends.

Each row is a separate request; many are in flight, and the server batches them. A server does not
reveal its weights, so they are declared (``teacher.weights_digest``, or a folder with the same
weights); if the folder is available, the parity gate compares the labels with it.
"""

import asyncio
import os
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlsplit

import numpy as np

from labeler.config import TeacherConfig
from labeler.teacher_model.identity import eos_ids
from labeler.teachers.canary import CANARY_IDS, CANARY_SPANS
from labeler.teachers.protocol import OnRow, RowLabels, ignore_row, usable_or_failure
from labeler.teachers.remote.client import MAX_INTERNAL_ERRORS, Refusal, VllmClient
from labeler.teachers.remote.parse_logprobs import row_labels
from labeler.teachers.request_checks import ModelLimits
from labeler.teachers.topk_candidates import LIMITS
from schemas.errors import RowFailure, TeacherError, TeacherGoneError
from schemas.spec import GenerationSpec, RecordSpec

_Result = TypeVar("_Result")
_Answer = dict[str, Any]

# At startup, a wrong URL is more likely than a server that is about to come back.
_START_PATIENCE_S = 20.0
_COMPLETIONS = "/v1/completions"

# Explicit, because a server may take other defaults from the model's generation_config.json.
_PLAIN_SAMPLING: dict[str, Any] = {
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class RemoteTeacher:
    """A model behind a vLLM server; see ``labeler.teachers.protocol.Teacher``."""

    shareable: ClassVar[bool] = True

    def __init__(self, config: TeacherConfig, record: RecordSpec) -> None:
        """Connects, and checks that the server can serve the record.

        Raises:
            TeacherError: The server cannot serve it, or serves another model.
            TeacherGoneError: No server answers.
        """
        _check_served(config, record)
        self._config = config
        self._record = record
        self._limits = ModelLimits.load(config)
        self._eos_ids = eos_ids(config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="remote", daemon=True)
        self._thread.start()
        self._open_client: VllmClient | None = None
        try:
            self._model, self._facts = self._run(self._connect())
        except BaseException:
            self.close()
            raise

    def _run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Runs a coroutine on the thread of the event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    @property
    def _client(self) -> VllmClient:
        assert self._open_client is not None, "the teacher is closed"
        return self._open_client

    async def _connect(self) -> tuple[str, dict[str, object]]:
        """Returns the server's name for the model, and facts for the provenance."""
        remote = self._config.remote
        self._open_client = VllmClient(self._config.url, _api_key(self._config), remote)
        answer = await self._client.request("/v1/models", patience_s=_START_PATIENCE_S)
        if isinstance(answer, Refusal):
            raise TeacherError(
                f"teacher.url: {self._config.url}/v1/models answers HTTP {answer.status} "
                f"({answer.message}); expected the OpenAI-compatible API of a vLLM server"
            )
        card = _model_card(answer, self._config)
        self._model = str(card["id"])
        max_len = card.get("max_model_len")
        if max_len is not None and max_len < self._limits.context:
            raise TeacherError(
                f"{self._config.url} serves {self._model} with --max-model-len {max_len}, but "
                f"{self._limits.context} is needed for rows of text.max_tokens = "
                f"{self._limits.context - 1}"
            )
        canary = await self._check_canary(self._label_payload(CANARY_IDS), _START_PATIENCE_S)
        self._parse_labels(canary, CANARY_IDS, CANARY_SPANS)
        answer = await self._client.request("/version", patience_s=0.0)
        version = "unknown" if isinstance(answer, Refusal) else str(answer.get("version"))
        return self._model, {"server": f"vllm {version}", "server_max_model_len": max_len}

    async def _check_canary(self, payload: _Answer, patience_s: float | None = None) -> _Answer:
        """Resends a request with a two-token prompt; returns the response.

        If the server refuses this row too, the original row is not to blame: the server was
        restarted with another name or other limits, or is a proxy without a backend.

        Raises:
            TeacherGoneError: The server refuses the row, or does not answer.
        """
        canary = {**payload, "prompt": CANARY_IDS.tolist(), "max_tokens": 1}
        answer = await self._client.request(_COMPLETIONS, canary, patience_s)
        if not isinstance(answer, Refusal):
            return answer
        num_candidates = payload.get("prompt_logprobs")
        option = f" with --max-logprobs {num_candidates} or more" if num_candidates else ""
        raise TeacherGoneError(
            f"{self._config.url} refuses even a row of two tokens (HTTP {answer.status}: "
            f"{answer.message}); expected a vLLM server that serves {self._model}{option}; "
            "committed labels are kept: check the server, then run the same command again"
        )

    def label(
        self,
        token_ids: Sequence[np.ndarray],
        label_spans: Sequence[np.ndarray],
        row_keys: np.ndarray,
        audit_rate: float = 0.0,
        on_row: OnRow = ignore_row,
    ) -> list[RowLabels | RowFailure]:
        """See ``Teacher.label``. Nothing is audited: no server returns the full distribution.

        Raises:
            TeacherGoneError: The server no longer answers, or refuses every row.
        """

        async def one(row: int, tokens: np.ndarray, spans: np.ndarray) -> RowLabels | RowFailure:
            refused = self._limits.refuse_request(tokens, spans)
            if refused is not None:
                return refused
            answer = await self._complete(self._label_payload(tokens))
            if isinstance(answer, RowFailure):
                return answer
            # In a thread, because parsing a long row would block other responses.
            labels = await asyncio.to_thread(self._parse_labels, answer, tokens, spans)
            on_row(row)
            return usable_or_failure(labels)

        pairs = zip(token_ids, label_spans, strict=True)
        return self._run(_all([one(row, *pair) for row, pair in enumerate(pairs)]))

    def _label_payload(self, token_ids: np.ndarray) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": [int(token) for token in token_ids],
            "max_tokens": 1,  # the least a server generates
            "temperature": 0.0,
            "prompt_logprobs": min(self._record.k, self._limits.vocab_size),
        }

    def _parse_labels(self, answer: _Answer, token_ids: np.ndarray, spans: np.ndarray) -> RowLabels:
        found = _choice(answer).get("prompt_logprobs")
        if found is None:
            raise TeacherError(
                f"{self._config.url} gives no prompt_logprobs; expected a vLLM server"
            )
        return row_labels(found, token_ids, spans, self._record.k, self._limits.vocab_size)

    def generate(
        self,
        prompt_ids: Sequence[np.ndarray],
        generation: GenerationSpec,
        seeds: Sequence[Sequence[int]],
        on_row: OnRow = ignore_row,
    ) -> list[list[np.ndarray] | RowFailure]:
        """See ``Teacher.generate``. Each sample is a separate request with its own seed."""

        async def sampled(row: int, prompt: np.ndarray, seed: int) -> np.ndarray | RowFailure:
            answer = await self._complete(self._sample_payload(prompt, generation, seed))
            on_row(row)
            return answer if isinstance(answer, RowFailure) else _sampled(answer, self._config.url)

        async def one(
            row: int, prompt: np.ndarray, prompt_seeds: Sequence[int]
        ) -> list[np.ndarray] | RowFailure:
            refused = self._limits.refuse_generation(prompt, generation.max_tokens)
            if refused is not None:
                return refused
            samples = []
            for sample in await _all([sampled(row, prompt, seed) for seed in prompt_seeds]):
                if isinstance(sample, RowFailure):
                    return sample
                samples.append(sample)
            return samples

        prompts = zip(prompt_ids, seeds, strict=True)
        return self._run(_all([one(row, *prompt) for row, prompt in enumerate(prompts)]))

    def _sample_payload(
        self, prompt: np.ndarray, generation: GenerationSpec, seed: int
    ) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": [int(token) for token in prompt],
            "max_tokens": generation.max_tokens,
            "temperature": generation.temperature,
            "top_p": generation.top_p,
            "seed": seed,
            "stop_token_ids": list(self._eos_ids),
            "return_token_ids": True,
            **_PLAIN_SAMPLING,
        }

    async def _complete(self, payload: dict[str, Any]) -> _Answer | RowFailure:
        """Returns the response for one row, or the reason why the server refuses the row.

        Raises:
            TeacherGoneError: The server no longer answers, or refuses every row.
            TeacherError: It answers other rows, but not this one.
        """
        try:
            answer = await self._client.request(_COMPLETIONS, payload)
        except TeacherGoneError as error:
            # The row may crash a server that restarts itself; rows are then tried one by one.
            await self._check_canary(payload, 0.0)
            raise TeacherError(f"the server answers other rows, but: {error}") from error
        if not isinstance(answer, Refusal):
            return answer
        await self._check_canary(payload)
        if not answer.is_internal:
            return RowFailure("engine_refused", f"HTTP {answer.status}: {answer.message}")
        return RowFailure(
            "server_error",
            f"HTTP {answer.status} {MAX_INTERNAL_ERRORS} times, though the server labels others: "
            f"{answer.message}",
        )

    def provenance(self) -> dict[str, object]:
        """See ``Teacher.provenance``. The weights are declared, not measured."""
        declared = self._config.weights_digest or f"those of the folder {self._config.model}"
        parts = urlsplit(self._config.url)
        port = "" if parts.port is None else f":{parts.port}"
        return {
            "backend": "remote",
            "model": self._config.model,
            "url": f"{parts.scheme}://{parts.hostname}{port}{parts.path}",
            "served_model": self._model,
            **self._facts,
            "weights": f"declared, not measured: {declared}",
            "dtype": f"declared, not measured: {self._config.dtype}",
            **LIMITS,
        }

    def close(self) -> None:
        """See ``Teacher.close``. The server keeps running."""
        client, self._open_client = self._open_client, None
        if client is not None:
            self._run(client.close())
        if self._loop.is_running():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


async def _all(work: Sequence[Coroutine[Any, Any, _Result]]) -> list[_Result]:
    """Runs coroutines concurrently; returns results in order. A failure cancels the rest."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as errors:
        raise _first(errors) from None
    return [task.result() for task in tasks]


def _first(errors: BaseExceptionGroup) -> BaseException:
    """Picks one of concurrent errors: ``TeacherGoneError`` if present, else the first."""
    single = [e for e in errors.exceptions if not isinstance(e, BaseExceptionGroup)]
    gone = [error for error in single if isinstance(error, TeacherGoneError)]
    return (gone or single or [_first(errors.exceptions[0])])[0]  # type: ignore[arg-type]


def _check_served(config: TeacherConfig, record: RecordSpec) -> None:
    unsupported = ", ".join(record.needs_beyond_topk())
    if unsupported:
        raise TeacherError(
            f"a server returns only the most probable ids, so {config.url} serves records of kind "
            f"topk without entropy and temperatures; the label set has {unsupported}"
        )
    known = ("hf_overrides", "rope_scaling", "rope_theta", "quantization", "trust_remote_code")
    other = sorted(config.engine.keys() - set(known))
    if other:
        raise TeacherError(
            f"teacher.engine.{other[0]}: the engine is the server's and already runs; only "
            f"what identifies its labels can be declared: {', '.join(known)}"
        )


def _api_key(config: TeacherConfig) -> str:
    name = config.remote.api_key_env
    if not name:
        return ""
    if not os.environ.get(name):
        raise TeacherError(
            f"teacher.remote.api_key_env names {name}, which is not set in the teacher's process; "
            "export it before the Ray node is started"
        )
    return os.environ[name]


def _model_card(answer: _Answer, config: TeacherConfig) -> dict[str, Any]:
    """The card of the configured model, or of the only one."""
    cards = {str(card.get("id")): card for card in answer.get("data", ())}
    wanted = config.remote.served_model
    if wanted in cards:
        return dict(cards[wanted])
    if not wanted and len(cards) == 1:
        return dict(next(iter(cards.values())))
    raise TeacherError(
        f"{config.url} serves {', '.join(sorted(cards)) or 'no model'}; "
        + (f'teacher.remote.served_model is "{wanted}"' if wanted else "")
        + ("" if wanted else "choose one in teacher.remote.served_model")
    )


def _choice(answer: _Answer) -> dict[str, Any]:
    choices = answer.get("choices") or [{}]
    return dict(choices[0])


def _sampled(answer: _Answer, url: str) -> np.ndarray:
    ids = _choice(answer).get("token_ids")
    if ids is None:
        raise TeacherError(
            f"{url} returns no token ids for its responses; expected a vLLM server that supports "
            "return_token_ids"
        )
    return np.array(ids, dtype=np.int32)
