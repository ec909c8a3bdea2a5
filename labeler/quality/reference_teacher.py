"""Which second implementation can check a teacher's labels on this machine; see ``parity``."""

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
Ask = Callable[[Callable[[Teacher], Scores]], Scores]

# Of the size of the weights on disk: half precision may become float32, and there are activations.
_MEMORY_SHARE = 2.5


def reference_of(config: TeacherConfig, ask: Ask) -> Reference | None:
    """The best reference there is for a teacher.

    Args:
        config: of the teacher.
        ask: has the teacher itself answer a question, by another engine where one dies.

    Returns:
        transformers on the CPU; the engine's own log-probabilities where the model is too large
        for that, or where transformers cannot load it; None where the teacher is the reference, or
        runs elsewhere and its weights are not here or are too large.
    """
    if config.backend not in ("vllm", "remote"):
        return None
    files = weight_files(model_folder(config))
    needed = _MEMORY_SHARE * sum(file.stat().st_size for file in files)
    if config.backend == "remote":
        here = files and needed <= psutil.virtual_memory().available
        return TransformersOnCpu(config) if here else None
    free = psutil.virtual_memory().available
    if needed > free:
        reason = f"transformers would need {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
        return StockPath(ask, reason)
    try:
        return TransformersOnCpu(config)
    except TeacherError as error:
        return StockPath(ask, str(error))


class TransformersOnCpu:
    """The same model by transformers, on the CPU, so that it takes nothing from the engine."""

    def __init__(self, config: TeacherConfig) -> None:
        from labeler.teachers.transformers_teacher import TransformersTeacher

        self.name = f"transformers {importlib.metadata.version('transformers')} on a CPU"
        plain = config.model_copy(update={"engine": {}, "backend": "transformers"})
        self._teacher = TransformersTeacher(plain, RecordSpec(kind="topk", k=1), device="cpu")

    def logprobs(
        self,
        token_ids: Sequence[np.ndarray],
        label_spans: Sequence[np.ndarray],
        entry_ids: Sequence[np.ndarray],
    ) -> list[np.ndarray]:
        """See ``Reference.logprobs``."""
        return self._teacher.logprobs(token_ids, label_spans, entry_ids)


class StockPath:
    """The engine's own log-probabilities: the same forward pass, another way from there."""

    def __init__(self, ask: Ask, reason: str) -> None:
        self.name = f"the engine's own path ({reason})"
        self._ask = ask

    def logprobs(
        self,
        token_ids: Sequence[np.ndarray],
        label_spans: Sequence[np.ndarray],
        entry_ids: Sequence[np.ndarray],
    ) -> list[np.ndarray]:
        """See ``Reference.logprobs``.

        Raises:
            TeacherError: the engine refuses a row by this path, or dies whenever it is asked.
        """
        from labeler.teachers.vllm.teacher import VllmTeacher

        def scores(teacher: Teacher) -> Scores:
            assert isinstance(teacher, VllmTeacher)
            return teacher.stock_logprobs(token_ids, label_spans, entry_ids)

        found = []
        for row in self._ask(scores):
            if isinstance(row, RowFailure):
                raise TeacherError(f"{self.name} refuses a row: {row.detail}")
            found.append(row)
        return found
