"""Where the time of labelling goes, on the thread that drives an engine of this process."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from labeler.teachers.vllm.teacher import VllmTeacher
from labeler.teachers.vllm.worker import label_step, runner_v1


def profile_us(
    teacher: VllmTeacher, run: Callable[[], object], num_tokens: int
) -> dict[str, float]:
    """Microseconds a token of one run, by what the engine's thread did.

    Returns:
        ``idle``, between steps of the engine; ``forward``, its steps without the label head, so
        with its scheduling; and of the head: ``arithmetic`` from logits to labels, ``audits``,
        ``carry`` (packing labels and dealing them to their rows), and ``head_rest``, nearly all of
        which is the product with the vocabulary. Nothing for an engine in a process of its own.
    """
    if not teacher.provenance()["in_process"]:
        return {}
    spent: dict[str, float] = defaultdict(float)
    places: list[tuple[Any, str, str]] = [
        (teacher._llm.llm_engine, "step", "step"),
        (runner_v1, "label_step", "head"),
        (label_step, "label_logits", "arithmetic"),
        (label_step, "audit_rows", "audits"),
        (label_step, "pack", "carry"),
        (label_step, "deal", "carry"),
    ]
    started = time.perf_counter()
    with _timed(places, spent):
        run()
    whole = time.perf_counter() - started
    inside = spent["arithmetic"] + spent["audits"] + spent["carry"]
    parts = {
        "idle": whole - spent["step"],
        "forward": spent["step"] - spent["head"],
        **{name: spent[name] for name in ("arithmetic", "audits", "carry")},
        "head_rest": spent["head"] - inside,
    }
    return {name: 1e6 * seconds / num_tokens for name, seconds in parts.items()}


@contextmanager
def _timed(places: list[tuple[Any, str, str]], spent: dict[str, float]) -> Iterator[None]:
    """Adds up the seconds that functions take, each under a name."""
    usual = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for (owner, name, function), (_, _, part) in zip(usual, places, strict=True):
        setattr(owner, name, _timer(function, part, spent))
    try:
        yield
    finally:
        for owner, name, function in usual:
            setattr(owner, name, function)


def _timer(function: Callable[..., Any], part: str, spent: dict[str, float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[part] += time.perf_counter() - started

    return timed
