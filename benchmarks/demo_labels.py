"""Labels of the demo's teacher on real text, for the benchmarks that want real labels."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.demo.corpus import write_corpus
from labeler.config import TeacherConfig
from labeler.corpus.windows import all_but_first, cut_windows
from labeler.teacher_model.identity import load_tokenizer
from labeler.teachers.protocol import RowLabels
from labeler.teachers.transformers_teacher import TransformersTeacher
from schemas.keys import row_key, stack_keys
from schemas.spec import RecordSpec

TEACHER = Path(__file__).resolve().parents[1] / "examples" / "teacher"
MAX_TOKENS = 512
OVERLAP = 64


@dataclass(frozen=True)
class TokenRows:
    """Windows of real text, as a label job cuts them.

    Attributes:
        token_ids: int32 [L] a row.
        label_spans: int32, flat [start, end) pairs a row.
        row_keys: uint8 [R, 16].
    """

    token_ids: list[np.ndarray]
    label_spans: list[np.ndarray]
    row_keys: np.ndarray

    @property
    def num_labels(self) -> int:
        return sum(int((spans[1::2] - spans[::2]).sum()) for spans in self.label_spans)


def teacher_config() -> TeacherConfig:
    """The demo's teacher, by transformers, in float32."""
    return TeacherConfig(
        backend="transformers", model=str(TEACHER), dtype="float32", max_model_len=MAX_TOKENS + 1
    )


def real_rows(num_labels: int) -> TokenRows:
    """Windows of the demo's held-out files, until they have this many labels."""
    tokenizer: Any = load_tokenizer(teacher_config())
    tokens: list[np.ndarray] = []
    spans: list[np.ndarray] = []
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder), {"heldout": 8 * num_labels})
        for file in sorted(Path(folder).rglob("*.py")):
            ids = tokenizer(file.read_text(encoding="utf-8"))["input_ids"]
            document = np.array([*ids, tokenizer.eos_token_id], np.int32)
            for window in cut_windows(
                len(document), all_but_first(len(document)), MAX_TOKENS, OVERLAP
            ):
                tokens.append(document[window.start : window.end])
                spans.append(window.spans)
            if sum(int((s[1::2] - s[::2]).sum()) for s in spans) >= num_labels:
                break
    keys = [row_key(*pair) for pair in zip(tokens, spans, strict=True)]
    return TokenRows(tokens, spans, stack_keys(keys))


def label(rows: TokenRows, record: RecordSpec) -> Sequence[RowLabels]:
    """Labels of all rows, before rounding."""
    teacher = TransformersTeacher(teacher_config(), record)
    results = teacher.label(rows.token_ids, rows.label_spans, rows.row_keys)
    labels = [result for result in results if isinstance(result, RowLabels)]
    assert len(labels) == len(results), "the demo's teacher labels every row of its corpus"
    return labels
