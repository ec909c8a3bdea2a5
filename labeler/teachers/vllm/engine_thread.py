"""The thread that owns an engine and runs other threads' calls on it.

An engine in this process is not thread-safe, and its OpenMP threads belong to the thread that
started it. Therefore one thread owns it: it takes calls from a queue, adds all of their requests to
the engine at once, and steps while any is unfinished. The requests of the next call are in the
engine before the last row of the current one is finished, so the engine never idles between calls.
"""

import itertools
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from labeler.teachers.protocol import OnRow, ignore_row
from schemas.errors import RowFailure, TeacherError

_Result = TypeVar("_Result")


class Engine(Protocol):
    """The subset of ``vllm.LLM.llm_engine`` used here."""

    def add_request(self, request_id: str, prompt: Any, params: Any) -> str:
        """Adds a request; raises ValueError if it is invalid."""

    def step(self) -> list[Any]:
        """Runs one step; outputs have ``request_id`` and ``finished``."""

    def has_unfinished_requests(self) -> bool:
        """Whether another step has work to do."""


@dataclass(frozen=True)
class EngineRequest:
    """One request to the engine.

    Attributes:
        prompt, params: Arguments of ``add_request``.
        prepare: Called with the engine and its own name for the request, once it is added.
    """

    prompt: Any
    params: Any
    prepare: Callable[[Any, str], None] | None = None


@dataclass
class _Call:
    """Requests of one caller; ``missing`` of them are still in the engine."""

    requests: Sequence[EngineRequest]
    on_row: OnRow = ignore_row
    future: "Future[list[Any]]" = field(default_factory=Future)
    outputs: list[Any] = field(default_factory=list)
    missing: int = 0


@dataclass
class _Alone:
    """A function that needs the engine exclusively."""

    run: Callable[[], None]
    is_last: bool = False


class EngineThread:
    """Runs one engine for calls from any number of threads.

    When the engine fails, its state is unknown, so all in-flight and later calls fail.
    """

    def __init__(self) -> None:
        self.engine: Engine | None = None
        """Set by the first function that runs alone, which starts the engine."""
        self._tasks: queue.SimpleQueue[_Call | _Alone] = queue.SimpleQueue()
        self._next: _Call | _Alone | None = None
        self._rows: dict[str, tuple[_Call, int]] = {}
        self._names = itertools.count()
        self._failure = ""
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def outputs(self, requests: Sequence[EngineRequest], on_row: OnRow = ignore_row) -> list[Any]:
        """The engine's last output for each request, or a RowFailure if it refused the request.

        Args:
            requests: Any number.
            on_row: Called on the engine's thread with the index of a request that has its output.

        Raises:
            TeacherError: The engine failed, now or earlier, or was closed meanwhile.
        """
        if not requests:
            return []
        call = _Call(requests, on_row, outputs=[None] * len(requests))
        self._put(call)
        return call.future.result()

    def alone(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """Runs a function on the thread while no request is in the engine; raises its errors.

        Later calls wait for it.
        """
        future: Future[_Result] = Future()
        self._put(_Alone(lambda: _fulfil(future, function, *arguments)))
        return future.result()

    def close(self, function: Callable[[], None]) -> None:
        """Fails calls in flight, runs a last function on the thread, and ends the thread."""
        future: Future[None] = Future()
        with self._lock:  # earlier tasks come first, and no later one is accepted
            self._closing.set()
            self._tasks.put(_Alone(lambda: _fulfil(future, function), is_last=True))
        future.result()
        self._thread.join()

    def _put(self, task: _Call | _Alone) -> None:
        with self._lock:
            if self._closing.is_set():
                raise TeacherError("this teacher is closed; make a new one")
            self._tasks.put(task)

    def _loop(self) -> None:
        while self._admit():
            if self._closing.is_set():
                self._fail("the teacher was closed")
            elif self._rows:
                self._step()

    def _admit(self) -> bool:
        """Starts queued tasks as far as possible; blocks only if the engine is idle."""
        while True:
            if self._next is None:
                try:
                    self._next = self._tasks.get(block=not self._rows)
                except queue.Empty:
                    return True
            if isinstance(self._next, _Call):
                self._add(self._next)
            elif self._rows:
                return True  # it runs once these requests are finished
            else:
                self._next.run()
                if self._next.is_last:
                    return False
            self._next = None

    def _add(self, call: _Call) -> None:
        if self._failure:
            call.future.set_exception(TeacherError(self._failure))
            return
        assert self.engine is not None, "the engine is started by the first function run alone"
        try:
            for place, request in enumerate(call.requests):
                name = f"row-{next(self._names)}"
                try:
                    inner_name = self.engine.add_request(name, request.prompt, request.params)
                except ValueError as error:
                    call.outputs[place] = RowFailure("engine_refused", str(error))
                    continue
                self._rows[name] = (call, place)
                call.missing += 1
                if request.prepare is not None:
                    request.prepare(self.engine, inner_name)
        except Exception as error:  # noqa: BLE001 - every caller gets it, whatever it is
            self._engine_failed(error, call)
            return
        self._finish_if_done(call)

    def _step(self) -> None:
        assert self.engine is not None
        try:
            if not self.engine.has_unfinished_requests():
                raise TeacherError("it reports no unfinished requests")
            outputs = self.engine.step()
        except Exception as error:  # noqa: BLE001 - every caller gets it, whatever it is
            self._engine_failed(error)
            return
        for output in outputs:
            if output.finished and output.request_id in self._rows:
                call, place = self._rows.pop(output.request_id)
                call.outputs[place] = output
                call.missing -= 1
                call.on_row(place)
                self._finish_if_done(call)

    def _finish_if_done(self, call: _Call) -> None:
        if not call.missing:
            call.future.set_result(call.outputs)

    def _engine_failed(self, error: Exception, *calls: _Call) -> None:
        self._failure = f"the vLLM engine failed with {len(self._rows)} rows in flight: {error}"
        self._fail(self._failure, *calls)

    def _fail(self, reason: str, *calls: _Call) -> None:
        """Fails these calls and those in flight; their later outputs are ignored."""
        failed = {id(call): call for call in (*calls, *(call for call, _ in self._rows.values()))}
        self._rows.clear()
        for call in failed.values():
            call.future.set_exception(TeacherError(reason))


def _fulfil(future: "Future[_Result]", function: Callable[..., _Result], *arguments: Any) -> None:
    """Sets the result of a function, or its error, as a thread pool would."""
    try:
        future.set_result(function(*arguments))
    except BaseException as error:  # noqa: BLE001 - raised in the caller
        future.set_exception(error)
