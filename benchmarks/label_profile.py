"""Labelling time by kind of work, on the thread that drives an engine in this process."""

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

from labeler.teachers.vllm.teacher import VllmTeacher
from labeler.teachers.vllm.worker import label_step


def profile_us(
    teacher: VllmTeacher, run: Callable[[], object], num_tokens: int
) -> dict[str, float]:
    """Microseconds per token of one run, by kind of work on the engine's thread.

    Returns:
        ``idle``, between steps of the engine; ``forward``, its steps without the label head, so
        with its scheduling; and of the head: ``arithmetic`` from logits to labels, ``audits``,
        ``carry`` (packing labels and copying them to their requests), and ``head_rest``, nearly all
        of it the product with the vocabulary. Empty for an engine in a process of its own.
    """
    if not teacher.provenance()["in_process"]:
        return {}
    spent: dict[str, float] = defaultdict(float)
    timed: list[tuple[Any, str, str]] = [
        (teacher._llm.llm_engine, "step", "step"),
        (label_step.StepLabeler, "label", "head"),
        (label_step, "label_logits", "arithmetic"),
        (label_step, "audit_rows", "audits"),
        (label_step, "pack", "carry"),
        (label_step, "scatter", "carry"),
    ]
    with ExitStack() as patches:
        for owner, name, part in timed:
            function = _timer(getattr(owner, name), part, spent)
            patches.enter_context(patch.object(owner, name, function))
        started = time.perf_counter()
        run()
        total = time.perf_counter() - started
    inside = {part: spent[part] for part in ("arithmetic", "audits", "carry")}
    parts = {
        "idle": total - spent["step"],
        "forward": spent["step"] - spent["head"],
        **inside,
        "head_rest": spent["head"] - sum(inside.values()),
    }
    return {name: 1e6 * seconds / num_tokens for name, seconds in parts.items()}


def _timer(function: Callable[..., Any], part: str, spent: dict[str, float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[part] += time.perf_counter() - started

    return timed
