"""A real HTTP server that speaks S3, in a process of its own.

Its own, because what it is made of changes the process that it runs in: an engine that starts there
afterwards looks at every module that was imported, and those of the server do not bear it.
"""

import logging
import multiprocessing
import threading
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any


class S3Server:
    """moto behind werkzeug, on a port of its own; it serves from the start on.

    moto answers a conditional put by a look and then a write. S3 does both as one step, so writes
    go one after another here.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._writes = context.Value("q", 0)
        self._ignores = context.Value("b", 0)
        self._unavailable = context.Value("b", 0)
        mine, its = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(its, self._writes, self._ignores, self._unavailable),
            daemon=True,
        )
        self._process.start()
        if not mine.poll(60):
            raise RuntimeError("the S3 server does not say its port")
        self._port: int = mine.recv()

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which a process reaches the server."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @property
    def writes(self) -> int:
        """Number of puts received."""
        return int(self._writes.value)

    @property
    def ignores_conditions(self) -> bool:
        """Whether it ignores conditions of puts, as some stores do."""
        return bool(self._ignores.value)

    @ignores_conditions.setter
    def ignores_conditions(self, value: bool) -> None:
        self._ignores.value = int(value)

    @property
    def unavailable(self) -> bool:
        """Whether it answers 503 to everything."""
        return bool(self._unavailable.value)

    @unavailable.setter
    def unavailable(self, value: bool) -> None:
        self._unavailable.value = int(value)

    def stop(self) -> None:
        """Stops the server."""
        self._process.terminate()
        self._process.join()


def _serve(port: Connection, writes: Any, ignores: Any, unavailable: Any) -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application = DomainDispatcherApplication(create_backend_app)
    lock = threading.Lock()

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if unavailable.value:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            is_head = environ["REQUEST_METHOD"] == "HEAD"
            body = (
                b"" if is_head else b"<Error><Code>SlowDown</Code><Message>busy</Message></Error>"
            )
            start_response("503 Slow Down", [("Content-Length", str(len(body)))])
            return [body]
        if environ["REQUEST_METHOD"] != "PUT":
            return application(environ, start_response)
        if ignores.value:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        with lock:
            writes.value += 1
            return list(application(environ, start_response))

    server = make_server("127.0.0.1", 0, answer, threaded=True)
    port.send(server.server_port)
    server.serve_forever()
