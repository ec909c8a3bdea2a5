"""The thread that an engine lives on, and how calls from several threads share it.

An engine in this process is not made for several threads, and its OpenMP threads belong to the
thread that started it. So one thread touches it: it takes calls from a queue, gives all of their
requests to the engine at once, and steps as long as anything is unfinished. The requests of the
next call are in the engine before the last row of this one leaves, so that it never runs dry
between calls.
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
    """What is used of ``vllm.LLM.llm_engine``."""

    def add_request(self, request_id: str, prompt: Any, params: Any) -> str:
        """Takes one request; a ValueError says what is wrong with it."""

    def step(self) -> list[Any]:
        """Works on what is scheduled; outputs have ``request_id`` and ``finished``."""

    def has_unfinished_requests(self) -> bool:
        """Whether another step has anything to do."""


@dataclass(frozen=True)
class EngineRequest:
    """One request, as the engine takes it.

    Attributes:
        prompt, params: The arguments of ``add_request`` behind the name.
        prepare: Called with the engine and the engine's own name for the request, once it is there.
    """

    prompt: Any
    params: Any
    prepare: Callable[[Any, str], None] | None = None


@dataclass
class _Call:
    """Requests that somebody waits for; ``missing`` of them are still in the engine."""

    requests: Sequence[EngineRequest]
    on_row: OnRow = ignore_row
    future: "Future[list[Any]]" = field(default_factory=Future)
    outputs: list[Any] = field(default_factory=list)
    missing: int = 0


@dataclass
class _Alone:
    """Something that has the engine for itself."""

    run: Callable[[], None]
    is_last: bool = False


class EngineThread:
    """Runs one engine for calls from any number of threads.

    When the engine fails, every call in flight fails with it, and so does every later one: nothing
    is known about its state any more.
    """

    def __init__(self) -> None:
        self.engine: Engine | None = None
        """Set by the first function that is run alone, which starts it."""
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
        """What the engine makes of each request: its last output, or a RowFailure if refused.

        Args:
            requests: Any number.
            on_row: Called on the engine's thread with the index of a request that has its output.

        Raises:
            TeacherError: The engine failed, now or before, or was closed meanwhile.
        """
        if not requests:
            return []
        call = _Call(requests, on_row, outputs=[None] * len(requests))
        self._put(call)
        return call.future.result()

    def alone(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """Runs a function on the thread when no request is in the engine; passes errors on.

        Calls that come later wait for it.
        """
        future: Future[_Result] = Future()
        self._put(_Alone(lambda: _fulfil(future, function, *arguments)))
        return future.result()

    def close(self, function: Callable[[], None]) -> None:
        """Fails what is in flight, runs a last function on the thread, and ends it."""
        future: Future[None] = Future()
        with self._lock:  # what was put before is in front of it, and nothing comes after
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
        """Starts what waits, as far as it may; waits where there is nothing else to do."""
        while True:
            if self._next is None:
                try:
                    self._next = self._tasks.get(block=not self._rows)
                except queue.Empty:
                    return True
            if isinstance(self._next, _Call):
                self._add(self._next)
            elif self._rows:
                return True  # it will be alone when these have left
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
        except Exception as error:  # noqa: BLE001 - whatever it is, all who wait get it
            self._engine_failed(error, call)
            return
        self._finish_if_done(call)

    def _step(self) -> None:
        assert self.engine is not None
        try:
            if not self.engine.has_unfinished_requests():
                raise TeacherError("it lost them")
            outputs = self.engine.step()
        except Exception as error:  # noqa: BLE001 - whatever it is, all who wait get it
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
        """Ends these calls and those in flight; nobody wants what the engine still has of them."""
        failed = {id(call): call for call in (*calls, *(call for call, _ in self._rows.values()))}
        self._rows.clear()
        for call in failed.values():
            call.future.set_exception(TeacherError(reason))


def _fulfil(future: "Future[_Result]", function: Callable[..., _Result], *arguments: Any) -> None:
    """What a thread pool does: the result, or the error, to whoever waits."""
    try:
        future.set_result(function(*arguments))
    except BaseException as error:  # noqa: BLE001 - raised where it is waited for
        future.set_exception(error)
