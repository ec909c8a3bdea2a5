"""A teacher that somebody else runs: a vLLM server, by its OpenAI-compatible HTTP API.

For teachers too large to be started by each job. The API tells the most probable ids of each
position of a prompt, so such a teacher serves records of kind ``topk`` without entropy; draws and
normalisers at other temperatures need the full distribution, which no server sends.

Rows go out one by one, many at the same time, and the server batches them. Nothing tells which
weights a server runs: that is declared (``teacher.weights_digest``, or the folder of the same
weights), and where the folder is there, the parity gate compares the labels with it.
"""

import asyncio
import os
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlsplit

import numpy as np

from labeler.config import TeacherConfig
from labeler.teacher_model.identity import (
    context_tokens,
    eos_ids,
    load_model_config,
    model_vocab_size,
)
from labeler.teachers.protocol import OnRow, RowLabels, ignore_row, usable_or_failure
from labeler.teachers.remote.client import MAX_INTERNAL_ERRORS, Refusal, RemoteServer
from labeler.teachers.remote.parse_logprobs import row_labels
from labeler.teachers.request_checks import refuse_generation, refuse_request
from labeler.teachers.topk_candidates import LIMITS, unsupported_by_topk
from schemas.errors import RowFailure, TeacherError, TeacherGoneError
from schemas.spec import GenerationSpec, RecordSpec

_Result = TypeVar("_Result")
_Answer = dict[str, Any]

# At the start a wrong URL is more likely than a server that will come back.
_START_PATIENCE_S = 20.0
_COMPLETIONS = "/v1/completions"
_CANARY = np.array([0, 1], np.int32)
_CANARY_SPANS = np.array([1, 2], np.int32)

# Set, because a server may have other defaults from the model's generation_config.json.
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
        """Connects, and checks that the server gives what the record asks for.

        Raises:
            TeacherError: It does not, or serves another model.
            TeacherGoneError: Nothing answers.
        """
        _check_served(config, record)
        self._config = config
        self._record = record
        self._vocab_size = model_vocab_size(load_model_config(config))
        self._context = context_tokens(config)
        self._eos_ids = eos_ids(config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="remote", daemon=True)
        self._thread.start()
        self._server: RemoteServer | None = None
        try:
            self._model, self._facts = self._run(self._connect())
        except BaseException:
            self.close()
            raise

    def _run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """The result of work on the thread that talks to the server."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    @property
    def _asked(self) -> RemoteServer:
        assert self._server is not None, "the teacher is closed"
        return self._server

    async def _connect(self) -> tuple[str, dict[str, object]]:
        """The server's name of the model, and what it says of itself."""
        remote = self._config.remote
        self._server = RemoteServer(self._config.url, _api_key(self._config), remote)
        answer = await self._server.ask("/v1/models", patience_s=_START_PATIENCE_S)
        if isinstance(answer, Refusal):
            raise TeacherError(
                f"teacher.url: {self._config.url}/v1/models answers HTTP {answer.status} "
                f"({answer.message}); expected the OpenAI-compatible API of a vLLM server"
            )
        card = _served(answer, self._config)
        self._model = str(card["id"])
        room = card.get("max_model_len")
        if room is not None and room < self._context:
            raise TeacherError(
                f"{self._config.url} serves {self._model} with --max-model-len {room}, but "
                f"{self._context} is needed for rows of text.max_tokens = {self._context - 1}"
            )
        await self._check_canary(_START_PATIENCE_S)
        version = await self._server.ask("/version", patience_s=0.0)
        told = "unknown" if isinstance(version, Refusal) else str(version.get("version"))
        return self._model, {"server": f"vllm {told}", "server_max_model_len": room}

    async def _check_canary(self, patience_s: float) -> None:
        """Labels a row of two tokens.

        Raises:
            TeacherError: The server cannot.
            TeacherGoneError: It does not answer.
        """
        answer = await self._asked.ask(_COMPLETIONS, self._label_question(_CANARY), patience_s)
        if isinstance(answer, Refusal):
            raise TeacherError(
                f"{self._config.url} cannot label a row of two tokens (HTTP {answer.status}: "
                f"{answer.message}); record.k = {self._record.k} needs a vLLM server with "
                f"--max-logprobs {self._record.k} or more"
            )
        self._parse_labels(answer, _CANARY, _CANARY_SPANS)

    def label(
        self,
        token_ids: Sequence[np.ndarray],
        label_spans: Sequence[np.ndarray],
        row_keys: np.ndarray,
        audit_rate: float = 0.0,
        on_row: OnRow = ignore_row,
    ) -> list[RowLabels | RowFailure]:
        """See ``Teacher.label``. Nothing is audited: no server tells the full distribution.

        Raises:
            TeacherGoneError: The server does not answer any more, or refuses every row.
        """

        async def one(row: int, tokens: np.ndarray, spans: np.ndarray) -> RowLabels | RowFailure:
            refused = refuse_request(tokens, spans, self._vocab_size, self._context)
            if refused is not None:
                return refused
            answer = await self._ask(self._label_question(tokens))
            if isinstance(answer, RowFailure):
                return answer
            # Parsing a long row takes a while, in which other answers come in.
            labels = await asyncio.to_thread(self._parse_labels, answer, tokens, spans)
            on_row(row)
            return usable_or_failure(labels)

        pairs = zip(token_ids, label_spans, strict=True)
        return self._run(_all([one(row, *pair) for row, pair in enumerate(pairs)]))

    def _label_question(self, token_ids: np.ndarray) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": [int(token) for token in token_ids],
            "max_tokens": 1,  # the least that a server generates
            "temperature": 0.0,
            "prompt_logprobs": min(self._record.k, self._vocab_size),
        }

    def _parse_labels(self, answer: _Answer, token_ids: np.ndarray, spans: np.ndarray) -> RowLabels:
        told = _choice(answer).get("prompt_logprobs")
        if told is None:
            raise TeacherError(
                f"{self._config.url} gives no prompt_logprobs; it has to be a vLLM server"
            )
        return row_labels(told, token_ids, spans, self._record.k, self._vocab_size)

    def generate(
        self,
        prompt_ids: Sequence[np.ndarray],
        generation: GenerationSpec,
        seeds: Sequence[Sequence[int]],
        on_row: OnRow = ignore_row,
    ) -> list[list[np.ndarray] | RowFailure]:
        """See ``Teacher.generate``. Every sample is a request of its own, with its own seed."""

        async def sampled(row: int, prompt: np.ndarray, seed: int) -> np.ndarray | RowFailure:
            answer = await self._ask(self._sample_question(prompt, generation, seed))
            on_row(row)
            return answer if isinstance(answer, RowFailure) else _sampled(answer, self._config.url)

        async def one(
            row: int, prompt: np.ndarray, prompt_seeds: Sequence[int]
        ) -> list[np.ndarray] | RowFailure:
            refused = refuse_generation(
                prompt, generation.max_tokens, self._vocab_size, self._context
            )
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

    def _sample_question(
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

    async def _ask(self, question: dict[str, Any]) -> _Answer | RowFailure:
        """The answer to one row's question, or what the server has against the row.

        Raises:
            TeacherGoneError: The server does not answer, or answers no row any more.
            TeacherError: It answers others, but not this.
        """
        try:
            answer = await self._asked.ask(_COMPLETIONS, question)
        except TeacherGoneError as error:
            # A row may end a server that starts again by itself: the rows are tried apart then.
            await self._check_canary(0.0)
            raise TeacherError(f"others are answered by the server, but: {error}") from error
        if not isinstance(answer, Refusal):
            return answer
        await self._check_others(question)
        if not answer.is_internal:
            return RowFailure("engine_refused", f"HTTP {answer.status}: {answer.message}")
        return RowFailure(
            "server_error",
            f"HTTP {answer.status} {MAX_INTERNAL_ERRORS} times, though the server labels others: "
            f"{answer.message}",
        )

    async def _check_others(self, question: dict[str, Any]) -> None:
        """Asks the same about a row of two tokens: what refuses that too has nothing against a row.

        A server that was started anew under another name or with other limits, or a proxy whose
        server is away, says no to whatever it is asked.

        Raises:
            TeacherGoneError: It is refused.
        """
        canary = {**question, "prompt": _CANARY.tolist(), "max_tokens": 1}
        answer = await self._asked.ask(_COMPLETIONS, canary)
        if isinstance(answer, Refusal):
            limit = question.get("prompt_logprobs")
            raise TeacherGoneError(
                f"{self._config.url} now refuses a row of two tokens as well (HTTP "
                f"{answer.status}: {answer.message}), so it is not down to the rows; expected a "
                f"vLLM server that serves {self._model}"
                + (f" with --max-logprobs {limit} or more" if limit else "")
                + "; what is committed stays: see to the server, then run the same command again"
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
        """See ``Teacher.close``. The server goes on."""
        server, self._server = self._server, None
        if server is not None:
            self._run(server.close())
        if self._loop.is_running():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


async def _all(work: Sequence[Coroutine[Any, Any, _Result]]) -> list[_Result]:
    """The results of work that is done at the same time, in order; what fails ends the rest."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as errors:
        raise _first(errors) from None
    return [task.result() for task in tasks]


def _first(errors: BaseExceptionGroup) -> BaseException:
    """Of what happened at the same time, that the server is gone; else the first error."""
    single = [e for e in errors.exceptions if not isinstance(e, BaseExceptionGroup)]
    gone = [error for error in single if isinstance(error, TeacherGoneError)]
    return (gone or single or [_first(errors.exceptions[0])])[0]  # type: ignore[arg-type]


def _check_served(config: TeacherConfig, record: RecordSpec) -> None:
    beyond = unsupported_by_topk(record)
    if beyond:
        raise TeacherError(
            f"a server tells the most probable ids only, so {config.url} serves records of kind "
            f"topk without entropy and temperatures; the label set has {beyond}"
        )
    known = ("hf_overrides", "rope_scaling", "rope_theta", "quantization", "trust_remote_code")
    other = sorted(config.engine.keys() - set(known))
    if other:
        raise TeacherError(
            f"teacher.engine.{other[0]}: the engine is the server's, started by somebody else; "
            f"only what identifies its labels can be declared: {', '.join(known)}"
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


def _served(answer: _Answer, config: TeacherConfig) -> dict[str, Any]:
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
        + ("" if wanted else "say which in teacher.remote.served_model")
    )


def _choice(answer: _Answer) -> dict[str, Any]:
    choices = answer.get("choices") or [{}]
    return dict(choices[0])


def _sampled(answer: _Answer, url: str) -> np.ndarray:
    ids = _choice(answer).get("token_ids")
    if ids is None:
        raise TeacherError(
            f"{url} gives no token ids of what it generates; a vLLM server that knows "
            "return_token_ids is needed"
        )
    return np.array(ids, dtype=np.int32)
