"""HTTP client of a vLLM server; retries a request while a retry can succeed.

A request ends with a response or a permanent refusal. While the server is overloaded, restarting or
unreachable, the request is retried with exponential backoff for ``patience_s``; after an internal
server error, only a few times.
"""

import asyncio
import random
import time
from dataclasses import dataclass
from typing import Any

import aiohttp

from labeler.config import RemoteConfig
from schemas.errors import TeacherError, TeacherGoneError

# Statuses caused by the state of the server, not by the request.
_BUSY = frozenset({408, 425, 429, 502, 503, 504})
_NOT_ALLOWED = frozenset({401, 403})

MAX_INTERNAL_ERRORS = 3
"""Internal errors (HTTP 500) on one request before the request itself is blamed."""

_FIRST_PAUSE_S = 0.125
_LONGEST_PAUSE_S = 20.0
_MESSAGE_CHARACTERS = 300


@dataclass(frozen=True)
class Refusal:
    """A permanent refusal: an HTTP status and the server's message."""

    status: int
    message: str

    @property
    def is_internal(self) -> bool:
        """Whether the server failed on the request instead of rejecting it."""
        return self.status >= 500


class VllmClient:
    """Sends requests to one server; belongs to the event loop that creates it."""

    def __init__(self, url: str, api_key: str, config: RemoteConfig) -> None:
        """Prepares the connection pool; nothing is sent yet.

        Args:
            url: URL of the server, with or without a path.
            api_key: Sent as a bearer token; empty: none.
            config: Time-outs, patience, concurrent requests.
        """
        self._url = url.rstrip("/").removesuffix("/v1")
        self._config = config
        self._in_flight = asyncio.Semaphore(config.requests_in_flight)
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=config.timeout_s, connect=30.0),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            connector=aiohttp.TCPConnector(limit=config.requests_in_flight),
        )

    async def request(
        self, path: str, payload: dict[str, Any] | None = None, patience_s: float | None = None
    ) -> dict[str, Any] | Refusal:
        """Sends a request and retries it until it is answered or refused.

        Args:
            path: From the server's root, ``/v1/completions``.
            payload: JSON to POST; None: GET.
            patience_s: Overrides the configured retry time.

        Raises:
            TeacherGoneError: No answer within the patience.
            TeacherError: The key is not accepted.
        """
        async with self._in_flight:
            patience = self._config.patience_s if patience_s is None else patience_s
            end, pause, internal = time.monotonic() + patience, _FIRST_PAUSE_S, 0
            while True:
                answer, wait_s = await self._attempt(path, payload)
                if isinstance(answer, dict):
                    return answer
                if answer.status in _NOT_ALLOWED:
                    raise TeacherError(self._not_allowed_message(answer))
                is_final = answer.status and answer.status not in _BUSY
                internal += bool(is_final and answer.is_internal)
                if is_final and (not answer.is_internal or internal >= MAX_INTERNAL_ERRORS):
                    return answer
                pause = min(max(pause * 2, wait_s), _LONGEST_PAUSE_S)
                delay = pause * random.uniform(0.5, 1.0)  # jitter, so that retries spread out
                if time.monotonic() + delay > end:
                    raise TeacherGoneError(self._gone_message(answer, patience))
                await asyncio.sleep(delay)

    async def _attempt(
        self, path: str, payload: dict[str, Any] | None
    ) -> tuple[dict[str, Any] | Refusal, float]:
        """Makes one attempt; returns the response (status 0: none) and Retry-After in seconds."""
        method = "GET" if payload is None else "POST"
        try:
            async with self._session.request(method, self._url + path, json=payload) as response:
                if response.status == 200:
                    found = await response.json(content_type=None)
                    if isinstance(found, dict):
                        return found, 0.0
                    return Refusal(501, f"{path} answered with no JSON object"), 0.0
                text = (await response.text())[:_MESSAGE_CHARACTERS]
                retry_after = response.headers.get("Retry-After", "")
                wait_s = float(retry_after) if retry_after.isdigit() else 0.0
                return Refusal(response.status, text), wait_s
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            # ValueError: a truncated answer is not JSON.
            return Refusal(0, f"{type(error).__name__} {error}".strip()), 0.0

    def _gone_message(self, last: Refusal, patience_s: float) -> str:
        what = f"HTTP {last.status}: {last.message}" if last.status else last.message
        return (
            f"the server at {self._url} gave no answer for {patience_s:.0f} s (teacher.remote."
            f"patience_s); the last attempt failed with {what}; committed labels are kept: check "
            "the server, then run the same command again"
        )

    def _not_allowed_message(self, answer: Refusal) -> str:
        return (
            f"the server at {self._url} does not accept the API key (HTTP {answer.status}: "
            f"{answer.message}); put the right one into the environment variable that "
            "teacher.remote.api_key_env names"
        )

    async def close(self) -> None:
        """Closes the connections."""
        await self._session.close()
