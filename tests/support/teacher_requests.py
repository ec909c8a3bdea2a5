"""Labelling requests for teacher tests, and comparisons of two teachers' labels."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from labeler.config import TeacherConfig
from labeler.teachers.protocol import RowLabels, Teacher
from labeler.teachers.vllm import label_requests
from labeler.teachers.vllm.teacher import VllmTeacher
from schemas.errors import RowFailure, TeacherError
from schemas.keys import row_key, stack_keys
from schemas.spec import RecordSpec

VOCAB_SIZE = 320
CONTEXT = 512
# Less than a row, so that long rows are prefilled in several steps.
BATCH_TOKENS = 192
RECORD = RecordSpec(kind="topk", k=16, temperatures=(0.5, 2.0))
ENGINE = {
    "max_num_batched_tokens": BATCH_TOKENS,
    "max_num_seqs": 16,
    "max_logprobs": RECORD.k,
    "kv_cache_memory_bytes": 2**28,
}
FLOATS = ("entry_logprobs", "tail_logmass", "target_logprob", "entropy", "lse")


def config(folder: Path, backend: str = "vllm", **fields: Any) -> TeacherConfig:
    engine = ENGINE if backend == "vllm" else {}
    content = {"model": str(folder), "backend": backend, "max_model_len": CONTEXT, "engine": engine}
    return TeacherConfig.model_validate({**content, **fields})


def make_rows(vocab_size: int = VOCAB_SIZE) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Rows of unequal length, some longer than a step of the engine; with one span or several."""
    rng = np.random.default_rng(0)
    lengths = [2, 5, 40, BATCH_TOKENS, BATCH_TOKENS + 1, CONTEXT - 1, 300, 77, 2 * BATCH_TOKENS]
    tokens = [rng.integers(0, vocab_size, length, dtype=np.int32) for length in lengths]
    spans = [np.array([1, length], dtype=np.int32) for length in lengths]
    spans[5] = np.array([3, 9, 9, 11, BATCH_TOKENS - 1, BATCH_TOKENS + 2, 505, 511], dtype=np.int32)
    spans[6] = np.array([299, 300], dtype=np.int32)
    spans[7] = np.array([30, 60], dtype=np.int32)
    return tokens, spans


def label(
    teacher: Teacher, tokens: list[np.ndarray], spans: list[np.ndarray]
) -> list[RowLabels | RowFailure]:
    """Labels rows under the keys of their content."""
    keys = [row_key(*pair) for pair in zip(tokens, spans, strict=True)]
    return teacher.label(tokens, spans, stack_keys(keys))


@contextmanager
def serving(teacher: Teacher, record: RecordSpec) -> Iterator[None]:
    """Temporarily switches a test teacher to another record."""
    usual = teacher._record
    for change in (record, usual):
        if isinstance(teacher, VllmTeacher):
            teacher._engine.alone(label_requests.install, teacher._llm, change)
        teacher._record = change
        if change is record:
            yield


def use_record(teacher: VllmTeacher, record: RecordSpec) -> None:
    """Has a running teacher label by another record from now on, by whatever path serves it."""
    before, teacher._record = teacher._record, record
    try:
        teacher._engine.alone(teacher._install_label_path)
    except TeacherError:
        teacher._record = before
        raise


def labelled(result: RowLabels | RowFailure) -> RowLabels:
    assert isinstance(result, RowLabels), result
    return result


def assert_same(one: RowLabels, other: RowLabels, tolerance: float) -> None:
    for name in FLOATS:
        np.testing.assert_allclose(
            getattr(one, name), getattr(other, name), rtol=0, atol=tolerance, err_msg=name
        )
    # Neighbours closer than the tolerance may stand in either order.
    unlike = one.entry_ids != other.entry_ids
    assert unlike.mean() < 0.01
    assert (one.target_rank != other.target_rank).mean() < 0.01


def assert_same_draws(
    one: list[RowLabels], other: list[RowLabels], tolerance: float, unlike: float
) -> None:
    """Labels with draws that are from the same random numbers and from nearly the same logits.

    An id at the edge of the head, or under a point at the edge of two ids, may go either way: at
    most a share ``unlike`` of all positions. The others have the same ids.
    """
    same = np.concatenate([_same_entries(a, b) for a, b in zip(one, other, strict=True)])
    assert (~same).mean() <= unlike, f"{(~same).sum()} of {len(same)} positions differ"
    for name in (*FLOATS, "entry_counts"):
        mine, theirs = (_joined(labels, name) for labels in (one, other))
        if mine is not None:
            np.testing.assert_allclose(
                mine[same], theirs[same], rtol=0, atol=tolerance, err_msg=name
            )


def _joined(labels: list[RowLabels], name: str) -> np.ndarray | None:
    columns = [getattr(row, name) for row in labels]
    return None if columns[0] is None else np.concatenate(columns)


def _same_entries(one: RowLabels, other: RowLabels) -> np.ndarray:
    """bool [N]: where both have the same ids in the same places."""
    same = (one.entry_ids == other.entry_ids).all(axis=1)
    same &= (one.head_len == other.head_len) & (one.tail_len == other.tail_len)
    if one.entry_counts is not None:
        same &= (one.entry_counts == other.entry_counts).all(axis=1)
    return same
