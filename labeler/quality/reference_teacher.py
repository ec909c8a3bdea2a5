"""Chooses the second implementation that checks a teacher's labels."""

import importlib.metadata
from collections.abc import Callable, Sequence

import numpy as np
import psutil

from labeler.config import TeacherConfig
from labeler.quality.parity import Reference
from labeler.teacher_model.identity import model_folder
from labeler.teacher_model.weights_digest import weight_files
from labeler.teachers.protocol import Teacher
from schemas.errors import RowFailure, TeacherError
from schemas.spec import RecordSpec

Scores = list[np.ndarray | RowFailure]
RunOnTeacher = Callable[[Callable[[Teacher], Scores]], Scores]

# Relative to the weights on disk: half precision may become float32, plus activations.
_MEMORY_FACTOR = 2.5


def choose_reference(config: TeacherConfig, run: RunOnTeacher) -> Reference | None:
    """Chooses the best reference that this machine can run.

    Args:
        config: configuration of the teacher.
        run: runs a task on the teacher itself, restarting its engine if it crashes.

    Returns:
        transformers on the CPU; the engine's own log-probabilities if the model is too large for
        that or transformers cannot load it; None if the teacher is the reference itself, or is
        remote and its weights are not on this machine or too large for it.

    Raises:
        TeacherError: no reference is defined for the backend.
    """
    match config.backend:
        case "transformers":
            return None
        case "vllm" | "remote":
            pass
        case other:
            raise TeacherError(
                f'no parity reference is defined for teacher.backend = "{other}"; expected "vllm", '
                '"transformers" or "remote"'
            )
    files = weight_files(model_folder(config))
    needed = _MEMORY_FACTOR * sum(file.stat().st_size for file in files)
    free = psutil.virtual_memory().available
    if config.backend == "remote":
        return transformers_on_cpu(config) if files and needed <= free else None
    if needed > free:
        reason = f"transformers would need {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
        return stock_path(run, reason)
    try:
        return transformers_on_cpu(config)
    except TeacherError as error:
        return stock_path(run, str(error))


def transformers_on_cpu(config: TeacherConfig) -> Reference:
    """Loads the same model in transformers, on the CPU so that it takes no GPU memory.

    Raises:
        TeacherError: transformers cannot load it.
    """
    from labeler.teachers.transformers_teacher import TransformersTeacher

    plain = config.model_copy(update={"engine": {}, "backend": "transformers"})
    teacher = TransformersTeacher(plain, RecordSpec(kind="topk", k=1), device="cpu")
    version = importlib.metadata.version("transformers")
    return Reference(f"transformers {version} on a CPU", teacher.logprobs)


def stock_path(run: RunOnTeacher, reason: str) -> Reference:
    """Uses the engine's own log-probabilities: the same forward pass without the label head.

    Its ``logprobs`` raises a TeacherError if the engine refuses a row or keeps crashing.

    Args:
        run: see ``choose_reference``.
        reason: why the reference is not transformers.
    """
    name = f"the engine's own path ({reason})"

    def logprobs(
        token_ids: Sequence[np.ndarray],
        label_spans: Sequence[np.ndarray],
        entry_ids: Sequence[np.ndarray],
    ) -> list[np.ndarray]:
        from labeler.teachers.vllm.teacher import VllmTeacher

        def score(teacher: Teacher) -> Scores:
            assert isinstance(teacher, VllmTeacher)
            return teacher.stock_logprobs(token_ids, label_spans, entry_ids)

        scores = []
        for row in run(score):
            if isinstance(row, RowFailure):
                raise TeacherError(f"{name} refuses a row: {row.detail}")
            scores.append(row)
        return scores

    return Reference(name, logprobs)
