"""A vLLM server by its HTTP API: one question at a time, asked again while it is worth it.

What comes back is an answer, or a refusal that asking again would not change. A server that is
overloaded, restarts or cannot be reached is asked again with growing pauses until patience is over;
a question that it answers with an internal error, a few times only.
"""

import asyncio
import random
import time
from dataclasses import dataclass
from typing import Any

import aiohttp

from labeler.config import RemoteConfig
from schemas.errors import TeacherError, TeacherGoneError

# Statuses that speak of the server's state and not of the question.
_BUSY = frozenset({408, 425, 429, 502, 503, 504})
_NOT_ALLOWED = frozenset({401, 403})

MAX_INTERNAL_ERRORS = 3
"""Internal errors (HTTP 500) over one question, before it is taken for the question's fault."""

_FIRST_PAUSE_S = 0.125
_LONGEST_PAUSE_S = 20.0
_MESSAGE_CHARACTERS = 300


@dataclass(frozen=True)
class Refusal:
    """An answer that says no, and will again: an HTTP status and the server's words."""

    status: int
    message: str

    @property
    def is_internal(self) -> bool:
        """Whether the server failed over the question, where it did not understand it else."""
        return self.status >= 500


class RemoteServer:
    """Asks one server; belongs to the event loop in which it was made."""

    def __init__(self, url: str, api_key: str, config: RemoteConfig) -> None:
        """Prepares; nothing is sent yet.

        Args:
            url: Of the server, with or without a path.
            api_key: Sent as a bearer token; empty: none.
            config: Time-outs, patience, questions at the same time.
        """
        self._url = url.rstrip("/").removesuffix("/v1")
        self._config = config
        self._places = asyncio.Semaphore(config.requests_in_flight)
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=config.timeout_s, connect=30.0),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            connector=aiohttp.TCPConnector(limit=config.requests_in_flight),
        )

    async def ask(
        self, path: str, question: dict[str, Any] | None = None, patience_s: float | None = None
    ) -> dict[str, Any] | Refusal:
        """Sends a question (POST), or only looks (GET), until there is an answer.

        Args:
            path: From the server's root, ``/v1/completions``.
            question: JSON; None: GET.
            patience_s: Instead of the configured one.

        Raises:
            TeacherGoneError: No answer within the patience.
            TeacherError: The key is not accepted.
        """
        async with self._places:
            patience = self._config.patience_s if patience_s is None else patience_s
            end, pause, internal = time.monotonic() + patience, _FIRST_PAUSE_S, 0
            while True:
                answer, wait_s = await self._try(path, question)
                if isinstance(answer, dict):
                    return answer
                if answer.status in _NOT_ALLOWED:
                    raise TeacherError(self._not_allowed(answer))
                known = answer.status and answer.status not in _BUSY
                internal += bool(known and answer.is_internal)
                if known and (not answer.is_internal or internal >= MAX_INTERNAL_ERRORS):
                    return answer
                pause = min(max(pause * 2, wait_s), _LONGEST_PAUSE_S)
                delay = pause * random.uniform(0.5, 1.0)  # not all of them at the same moment
                if time.monotonic() + delay > end:
                    raise TeacherGoneError(self._gone(answer, patience))
                await asyncio.sleep(delay)

    async def _try(
        self, path: str, question: dict[str, Any] | None
    ) -> tuple[dict[str, Any] | Refusal, float]:
        """One attempt: the answer, or status 0 where none came; and how long to wait, if told."""
        method = "GET" if question is None else "POST"
        try:
            async with self._session.request(method, self._url + path, json=question) as response:
                if response.status == 200:
                    found = await response.json(content_type=None)
                    if isinstance(found, dict):
                        return found, 0.0
                    return Refusal(501, f"{path} answered with no JSON object"), 0.0
                text = (await response.text())[:_MESSAGE_CHARACTERS]
                told = response.headers.get("Retry-After", "")
                return Refusal(response.status, text), float(told) if told.isdigit() else 0.0
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            # ValueError: the answer was cut off, so that it is no JSON.
            return Refusal(0, f"{type(error).__name__} {error}".strip()), 0.0

    def _gone(self, last: Refusal, patience_s: float) -> str:
        what = f"HTTP {last.status}: {last.message}" if last.status else last.message
        return (
            f"the server at {self._url} gave no answer for {patience_s:.0f} s (teacher.remote."
            f"patience_s), at last {what}; what is committed stays: see to the server, then run "
            "the same command again"
        )

    def _not_allowed(self, answer: Refusal) -> str:
        return (
            f"the server at {self._url} does not accept the API key (HTTP {answer.status}: "
            f"{answer.message}); put the right one into the environment variable that "
            "teacher.remote.api_key_env names"
        )

    async def close(self) -> None:
        """Closes the connections."""
        await self._session.close()
