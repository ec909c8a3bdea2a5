"""The reference teacher: what fails inside torch is the engine's failure, which rows outlive."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from labeler.config import TeacherConfig
from labeler.corpus.requests import label_request
from labeler.corpus.windows import all_but_first
from labeler.supervision.attempts import Attempts
from labeler.supervision.supervisor import EngineSupervisor
from labeler.teachers.protocol import RowLabels
from labeler.teachers.transformers_teacher import TransformersTeacher
from schemas.errors import TeacherError
from schemas.spec import GenerationSpec, RecordSpec
from schemas.storage.store import Store

POISON = 13
ROW = np.array([5, POISON, 9], np.int32)
SPANS = np.array([1, 3], np.int32)
KEYS = np.zeros((1, 16), np.uint8)


def fragile_teacher(model: Path, error: Exception) -> TransformersTeacher:
    """A teacher whose forward pass fails over a certain token."""
    config = TeacherConfig(backend="transformers", model=str(model), max_model_len=32)
    teacher = TransformersTeacher(config, RecordSpec(kind="topk", k=4), device="cpu")

    def fail(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        if (inputs["input_ids"] == POISON).any():
            raise error

    teacher._model.register_forward_pre_hook(fail, with_kwargs=True)
    return teacher


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("no room\nfor 3 GiB"), r"\(OutOfMemoryError: no room\); lower"),
        (RuntimeError("shapes cannot be multiplied"), r"\(RuntimeError: shapes cannot be multi"),
        (RuntimeError(), r"\(RuntimeError: RuntimeError\)"),
    ],
)
def test_failed_forward_pass_is_a_teacher_error(
    tiny_model_dir: Path, error: Exception, told: str
) -> None:
    teacher = fragile_teacher(tiny_model_dir, error)
    with pytest.raises(TeacherError, match=rf"on cpu failed in a forward pass {told}") as caught:
        teacher.label([ROW], [SPANS], KEYS)
    assert caught.value.__cause__ is error
    with pytest.raises(TeacherError, match=told):
        teacher.generate([ROW], GenerationSpec(max_tokens=2), [[1]])
    (labels,) = teacher.label([np.array([5, 7, 9], np.int32)], [SPANS], KEYS)
    assert isinstance(labels, RowLabels)


def test_programming_error_is_no_teacher_error(tiny_model_dir: Path) -> None:
    teacher = fragile_teacher(tiny_model_dir, TypeError("a bug"))
    with pytest.raises(TypeError, match="a bug"):
        teacher.label([ROW], [SPANS], KEYS)


def test_row_that_runs_out_of_memory_does_not_end_the_job(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    supervisor = EngineSupervisor(
        lambda: fragile_teacher(tiny_model_dir, torch.OutOfMemoryError("no room")),
        Attempts(Store(str(tmp_path)), "run"),
        None,
    )
    rows = [np.array([token, 5], np.int32) for token in (7, 8, POISON, 9)]
    requests = [label_request(row, all_but_first(2), "a", at, 0) for at, row in enumerate(rows)]
    found, _ = supervisor.label(requests)
    assert [request.place for request in found.requests] == [0, 1, 3]
    assert [(row.place, row.reason) for row in found.quarantined] == [(2, "kills_engine")]
