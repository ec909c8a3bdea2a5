"""Labelling requests for the tests of teachers, and how two teachers' answers are compared."""

from pathlib import Path
from typing import Any

import numpy as np

from labeler.config import TeacherConfig
from labeler.teachers.base import RowFailure, RowLabels
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
FLOATS = ("head_logprobs", "tail_logmass", "target_logprob", "entropy", "lse")


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


def labelled(result: RowLabels | RowFailure) -> RowLabels:
    assert isinstance(result, RowLabels), result
    return result


def assert_same(one: RowLabels, other: RowLabels, tolerance: float) -> None:
    for name in FLOATS:
        np.testing.assert_allclose(
            getattr(one, name), getattr(other, name), rtol=0, atol=tolerance, err_msg=name
        )
    # Neighbours closer than the tolerance may stand in either order.
    unlike = one.head_ids != other.head_ids
    assert unlike.mean() < 0.01
    assert (one.target_rank != other.target_rank).mean() < 0.01
