"""The demo teacher's labels of real text, for benchmarks that need real labels.

Shapes: R rows, L tokens per row.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cluster.demo.corpus import write_corpus
from labeler.config import TeacherConfig
from labeler.corpus.windows import all_but_first, cut_windows
from labeler.teacher_model.identity import load_tokenizer
from labeler.teachers.protocol import RowLabels
from labeler.teachers.transformers_teacher import TransformersTeacher
from labeler.units.assemble import assemble_rows
from schemas.keys import content_key, row_key, stack_keys
from schemas.record import LabelRows
from schemas.spec import RecordSpec

TEACHER = Path(__file__).resolve().parents[1] / "examples" / "teacher"
MAX_TOKENS = 512
OVERLAP = 64


@dataclass(frozen=True)
class TokenRows:
    """R windows of text, split as in a label job.

    Attributes:
        token_ids: int32 [L] for each row.
        label_spans: int32, flat [start, end) pairs for each row.
    """

    token_ids: list[np.ndarray]
    label_spans: list[np.ndarray]

    def __getitem__(self, rows: slice) -> "TokenRows":
        return TokenRows(self.token_ids[rows], self.label_spans[rows])

    @property
    def num_labels(self) -> int:
        return sum(int((spans[1::2] - spans[::2]).sum()) for spans in self.label_spans)

    @cached_property
    def row_keys(self) -> np.ndarray:
        """uint8 [R, 16]."""
        return stack_keys(list(map(row_key, self.token_ids, self.label_spans)))

    def assembled(self, labels: Sequence[RowLabels], record: RecordSpec) -> LabelRows:
        """The rows with their labels, rounded as in a label set."""
        content = stack_keys(list(map(content_key, self.token_ids, self.label_spans)))
        return assemble_rows(
            self.row_keys, content, self.token_ids, self.label_spans, labels, record
        )


def teacher_config() -> TeacherConfig:
    """The demo's teacher, run by transformers in float32."""
    return TeacherConfig(
        backend="transformers", model=str(TEACHER), dtype="float32", max_model_len=MAX_TOKENS + 1
    )


def real_rows(num_labels: int) -> TokenRows:
    """Windows of the demo's held-out files, with at least this many labels in all."""
    tokenizer: Any = load_tokenizer(teacher_config())
    rows = TokenRows([], [])
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder), {"heldout": 8 * num_labels})
        for file in sorted(Path(folder).rglob("*.py")):
            ids = tokenizer(file.read_text(encoding="utf-8"))["input_ids"]
            document = np.array([*ids, tokenizer.eos_token_id], np.int32)
            targets = all_but_first(len(document))
            for window in cut_windows(len(document), targets, MAX_TOKENS, OVERLAP):
                rows.token_ids.append(document[window.start : window.end])
                rows.label_spans.append(window.spans)
            if rows.num_labels >= num_labels:
                break
    return rows


def label(rows: TokenRows, record: RecordSpec) -> Sequence[RowLabels]:
    """The demo teacher's labels of all rows, before rounding."""
    teacher = TransformersTeacher(teacher_config(), record)
    results = teacher.label(rows.token_ids, rows.label_spans, rows.row_keys)
    labels = [result for result in results if isinstance(result, RowLabels)]
    assert len(labels) == len(results), "the demo's teacher labels every row of its corpus"
    return labels


def ids_per_label(labels: Sequence[RowLabels]) -> float:
    """Mean number of entries per label."""
    entries = sum(int((row.head_len + row.tail_len).sum()) for row in labels)
    return entries / sum(row.num_labels for row in labels)
