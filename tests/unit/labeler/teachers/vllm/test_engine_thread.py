"""Calls from several threads share one engine: nothing waits, nothing is lost, failures reach all.

The engine here works as vLLM's does, on a request a step, so that every step can be looked at.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from labeler.teachers.vllm.engine_thread import EngineRequest, EngineThread
from schemas.errors import RowFailure, TeacherError

REFUSED, DEADLY = "refused", "deadly"
LIMIT_S = 20.0


@dataclass
class Output:
    request_id: str
    text: str
    finished: bool


class SlowEngine:
    """Finishes one request in two steps; notes what it had in each."""

    def __init__(self) -> None:
        self.waiting: list[tuple[str, str]] = []
        self.half_done = False
        self.threads: set[str] = set()
        self.seen: list[list[str]] = []

    def add_request(self, request_id: str, prompt: str, params: object) -> str:
        self.threads.add(threading.current_thread().name)
        if prompt == REFUSED:
            raise ValueError("not this one")
        self.waiting.append((request_id, prompt))
        return request_id

    def step(self) -> list[Output]:
        self.threads.add(threading.current_thread().name)
        self.seen.append([prompt for _, prompt in self.waiting])
        name, prompt = self.waiting[0]
        if prompt == DEADLY:
            raise RuntimeError("out of memory")
        self.half_done = not self.half_done
        if not self.half_done:
            del self.waiting[0]
        return [Output(name, prompt, not self.half_done)]

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)


@pytest.fixture
def engine() -> SlowEngine:
    return SlowEngine()


@pytest.fixture
def thread(engine: SlowEngine) -> Iterator[EngineThread]:
    thread = EngineThread()
    thread.alone(setattr, thread, "engine", engine)
    yield thread
    thread.close(lambda: None)


def requests(*prompts: str) -> list[EngineRequest]:
    return [EngineRequest(prompt, None) for prompt in prompts]


def texts(outputs: list[Output | RowFailure]) -> list[str]:
    return [one.detail if isinstance(one, RowFailure) else one.text for one in outputs]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def started_together(thread: EngineThread, *calls: list[str]) -> list[object]:
    """Results, or errors, of calls that were all made while the engine was held up."""
    go = threading.Event()
    with ThreadPoolExecutor(1 + len(calls)) as pool:
        held = pool.submit(thread.alone, go.wait, LIMIT_S)
        until(held.running)
        futures = []
        for count, call in enumerate(calls, 1):
            futures.append(pool.submit(thread.outputs, requests(*call)))
            until(lambda count=count: thread._tasks.qsize() >= count)
        go.set()
        return [future.exception() or texts(future.result()) for future in futures]


def test_engine_gets_the_next_call_before_this_one_ends(
    thread: EngineThread, engine: SlowEngine
) -> None:
    assert started_together(thread, ["a", "b"], ["c"]) == [["a", "b"], ["c"]]
    assert engine.seen == [["a", "b", "c"]] * 2 + [["b", "c"]] * 2 + [["c"]] * 2
    assert engine.threads == {"engine"}


def test_engine_thread_returns_each_calls_rows_in_order(thread: EngineThread) -> None:
    calls = [[f"{call}-{row}" for row in range(5)] for call in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda call: texts(thread.outputs(requests(*call))), calls)
        assert list(found) == calls
    assert thread.outputs([]) == []


def test_each_row_is_reported_when_the_engine_has_finished_it(thread: EngineThread) -> None:
    finished: list[int] = []
    thread.outputs(requests("a", REFUSED, "b"), finished.append)
    assert finished == [0, 2]


def test_refused_request_leaves_others_alone(thread: EngineThread) -> None:
    assert texts(thread.outputs(requests("a", REFUSED, "b"))) == ["a", "not this one", "b"]
    assert texts(thread.outputs(requests(REFUSED))) == ["not this one"]


def test_failure_fails_calls_in_flight_and_later_ones(thread: EngineThread) -> None:
    first, second = started_together(thread, ["a", DEADLY], ["b"])
    for error in (first, second):
        assert isinstance(error, TeacherError)
        assert "failed with 2 rows in flight: out of memory" in str(error)
    with pytest.raises(TeacherError, match="out of memory"):
        thread.outputs(requests("c"))


def test_engine_thread_misses_rows_that_the_engine_lost(
    thread: EngineThread, engine: SlowEngine
) -> None:
    engine.add_request = lambda *_: "taken"  # type: ignore[method-assign]
    with pytest.raises(TeacherError, match="1 rows in flight: it reports no unfinished"):
        thread.outputs(requests("a"))


def test_alone_waits_until_the_engine_is_empty(thread: EngineThread, engine: SlowEngine) -> None:
    def count() -> int:
        return len(engine.waiting)

    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(thread.outputs, requests("a", "b")) for _ in range(2)]
        assert pool.submit(thread.alone, count).result() == 0
        assert [texts(call.result()) for call in calls] == [["a", "b"]] * 2
    with pytest.raises(ZeroDivisionError):
        thread.alone(lambda: 1 / 0)


def test_closing_fails_what_is_in_flight(engine: SlowEngine) -> None:
    thread, step = EngineThread(), threading.Event()
    thread.alone(setattr, thread, "engine", engine)
    usual = engine.step

    def slow_step() -> list[Output]:
        step.set()
        return usual()

    engine.step = slow_step  # type: ignore[method-assign]
    closed: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(thread.outputs, requests(*map(str, range(100_000))))
        assert step.wait(LIMIT_S)
        thread.close(lambda: closed.append(1))
        with pytest.raises(TeacherError, match="the teacher was closed"):
            call.result(LIMIT_S)
    assert closed == [1]
    with pytest.raises(TeacherError, match="is closed"):
        thread.outputs(requests("a"))
