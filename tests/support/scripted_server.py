"""A scripted loopback server for the part of vLLM's API that a remote teacher uses."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

POISON = 13
"""A row with this token always gets an internal error."""


def entry(logprob: float, rank: int) -> dict[str, Any]:
    return {"logprob": logprob, "rank": rank, "decoded_token": "x"}


def told(head: dict[int, float], token: int, logprob: float, rank: int) -> dict[str, Any]:
    """One position as vLLM reports it: first the actual token, then the head."""
    found = {str(token): entry(logprob, rank)}
    for place, (name, value) in enumerate(head.items()):
        found[str(name)] = entry(value, place + 1)
    return found


def positions(prompt: list[int]) -> list[dict[str, Any] | None]:
    half = float(np.log(0.5))
    rest = [told({1: half, 0: float(np.log(0.25))}, token, -5.0, 9) for token in prompt[1:]]
    return [None, *rest]


class Handler(BaseHTTPRequestHandler):
    """Answers like a vLLM server; ``server.script`` says which statuses come before that.

    ``server.refusal`` is a status with which every row is refused, the canary too; 0: none is.
    """

    def _send(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/version":
            self._send(200, {"version": "0"})
        else:
            self._send(200, {"data": [{"id": "big", "max_model_len": 64}]})

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server: Any = self.server
        server.asked.append(question)
        if len(server.asked) > server.lifetime:
            self.connection.close()
        elif server.refusal:
            self._send(server.refusal, {"error": "not here"})
        elif len(question["prompt"]) > 2 and server.script:
            status = server.script.pop(0)
            if status == 0:
                self.connection.close()
            else:
                self._send(status, {"error": "not now"})
        elif POISON in question["prompt"]:
            self._send(500, {"error": "Out of range float values are not JSON compliant"})
        else:
            prompt_logprobs = positions(question["prompt"])
            self._send(200, {"choices": [{"prompt_logprobs": prompt_logprobs}]})

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def server(*script: int) -> Iterator[Any]:
    """A loopback server that first answers rows (not the canary) with the statuses given."""
    running: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.script, running.asked, running.lifetime = list(script), [], 10**9
    running.refusal = 0
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield running
    finally:
        running.shutdown()
        running.server_close()
