"""`validate`: the invariants of the label record, checked on every batch before it is written.

Each rule is one vectorised pass over a batch; the place of a violation is computed only on failure.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from schemas.record.columns import COLUMNS
from schemas.record.entry_checks import check_entries
from schemas.record.record_check import RecordCheck, is_valid_logprob, preview
from schemas.record.rows import LabelRows, present
from schemas.record.spans import Bools, label_offsets, offsets_of
from schemas.spec import RecordSpec


def validate(rows: LabelRows, spec: RecordSpec, vocab_size: int, where: str = "") -> None:
    """Checks every invariant of the record.

    - Token ids and entry ids are in the vocabulary.
    - Spans are ascending, disjoint and within the row; array lengths are consistent.
    - Heads have an allowed length, unique ids by decreasing log-probability, and the content that
      the record defines.
    - Draws have ascending ids that are not in the head, and a possible number.
    - Log-probabilities are finite and not positive; head and tail mass sum to one within rounding.
    - The target's log-probability and rank agree with its entry, if it has one. Labels shifted by
      one position fail here.

    Args:
        rows: the batch.
        spec: the record of the rows.
        vocab_size: V; ids are in [0, V).
        where: prefix of the message, for example the path of the shard.

    Raises:
        RecordError: an invariant is violated; the message names `where`, the row in the batch, the
            position in the row, and the column.
    """
    check = _RowCheck(rows, spec, vocab_size, where)
    check.columns()
    check.tokens()
    check.spans()
    if spec.kind != "tokens":
        check.lengths()
        check.label_values()
        check_entries(rows, spec, vocab_size, where)


class _RowCheck(RecordCheck):
    """Rules for columns, tokens, spans, lengths and per-label values."""

    def columns(self) -> None:
        rows, spec = self.rows, self.spec
        for name, column in COLUMNS.items():
            values = getattr(rows, name, None)
            if name in ("num_tokens", "num_labels"):
                continue
            if (values is not None) != (name in spec.columns):
                state = "missing" if values is None else "present"
                self.fail(f"column {name} is {state}; the record spec has {spec.columns}")
            is_key = pa.types.is_fixed_size_binary(column.value_type)
            dtype = np.dtype(np.uint8 if is_key else column.value_type.to_pandas_dtype())
            if values is not None and values.dtype != dtype:
                self.fail(f"column {name} has dtype {values.dtype}; expected {dtype}")
        for name in ("row_key", "content_key"):
            if getattr(rows, name).shape != (len(rows), 16):
                self.fail(f"column {name} has shape {getattr(rows, name).shape}; expected [R, 16]")
        self.offsets("token_offsets", len(rows), len(rows.token_ids))
        self.offsets("span_offsets", len(rows), len(rows.label_spans))
        if rows.teacher_context is not None:
            self.offsets("context_offsets", len(rows), len(rows.teacher_context))

    def offsets(self, name: str, count: int, end: int) -> None:
        values = getattr(self.rows, name)
        if values is None or values.dtype != np.int64 or values.shape != (count + 1,):
            found = "none" if values is None else f"{values.dtype} {values.shape}"
            self.fail(f"{name}: found {found}; expected int64 ({count + 1},)")
        if values[0] != 0 or values[-1] != end or (np.diff(values) < 0).any():
            self.fail(f"{name}: expected values rising from 0 to {end}, found {preview(values)}")

    def tokens(self) -> None:
        rows = self.rows
        self.reject_values(self.outside(rows.token_ids), "token_ids", self.id_range)
        if rows.teacher_context is not None:
            bad = self.outside(rows.teacher_context)
            self.reject_values(bad, "teacher_context", self.id_range)
        if (np.diff(rows.token_offsets) < 1).any():
            row = int(np.argmax(np.diff(rows.token_offsets) < 1))
            self.fail(f"row {row}, column token_ids: found no tokens; expected at least one")

    def spans(self) -> None:
        rows = self.rows
        if (rows.span_offsets % 2).any():
            row = int(np.argmax(rows.span_offsets % 2)) - 1
            self.fail(f"row {row}, column label_spans: found an odd count; expected [start, end)")
        spans = rows.label_spans
        rising = np.diff(spans, prepend=np.int32(0))
        # Ends exceed starts; a start may equal the previous end; each row starts over.
        first = rows.span_offsets[:-1][np.diff(rows.span_offsets) > 0]
        rising[first] = spans[first]
        bad: Bools = np.asarray(rising < (np.arange(len(spans)) % 2))
        bad[first] |= spans[first] < 1
        self.reject_values(
            bad, "label_spans", "expected rising, disjoint [start, end) with start >= 1"
        )
        lengths = np.repeat(np.diff(rows.token_offsets), np.diff(rows.span_offsets))
        self.reject_values(spans > lengths, "label_spans", "expected ends within the row's tokens")
        if not np.array_equal(rows.label_offsets, label_offsets(spans, rows.span_offsets)):
            self.fail("label_offsets: expected the number of positions that label_spans cover")

    def lengths(self) -> None:
        rows, spec = self.rows, self.spec
        for name in ("head_len", "tail_len", "tail_logmass", "target_logprob", "target_rank"):
            self.shape(name, (rows.num_labels,))
        if rows.entropy is not None:
            self.shape("entropy", (rows.num_labels,))
        if rows.lse is not None:
            self.shape("lse", (rows.num_labels, len(spec.temperatures)))
        head, tail = present(rows.head_len), present(rows.tail_len)
        most = spec.most_entries(self.vocab_size)
        heads = {"topk": (most, most), "sampled": (0, 0)}.get(spec.kind, (1, most))
        tails = {"sampled": (1, most), "threshold": (0, most)}.get(spec.kind, (0, 0))
        self.within(head, heads, "head_len")
        self.within(tail, tails, "tail_len")
        lengths = head.astype(np.int64) + tail
        bad = lengths > most
        self.reject_labels(bad, "tail_len", f"expected at most {most} together with head_len")
        offsets = offsets_of(lengths)
        if not np.array_equal(present(rows.entry_offsets), offsets):
            self.fail("entry_offsets: expected the running sum of head_len + tail_len")
        self.shape("entry_ids", (int(offsets[-1]),))
        self.shape("entry_logprobs", (int(offsets[-1]),))
        if rows.entry_counts is not None:
            self.shape("entry_counts", (int(offsets[-1]),))

    def within(self, lengths: Any, bounds: tuple[int, int], name: str) -> None:
        least, most = bounds
        expected = str(least) if least == most else f"{least} to {most}"
        bad = (lengths < least) | (lengths > most)
        self.reject_labels(bad, name, f'expected {expected} for kind "{self.spec.kind}"')

    def shape(self, name: str, expected: tuple[int, ...]) -> None:
        found = getattr(self.rows, name).shape
        if found != expected:
            self.fail(f"column {name} has shape {found}; expected {expected} from spans and heads")

    def label_values(self) -> None:
        rows = self.rows
        for name in ("tail_logmass", "target_logprob"):
            bad = ~is_valid_logprob(getattr(rows, name))
            self.reject_labels(bad, name, "expected finite and not positive")
        rank = present(rows.target_rank)
        bad = (rank < 1) | (rank > self.vocab_size)
        self.reject_labels(bad, "target_rank", f"expected 1 to {self.vocab_size}")
        if rows.entropy is not None:
            # A rounded entropy may exceed the maximum, log V.
            highest = np.log(self.vocab_size) * (1 + 2.0**-self.spec.logprob_bits) + 0.01
            bad = ~((rows.entropy >= 0) & (rows.entropy <= highest))
            self.reject_labels(bad, "entropy", f"expected 0 to log {self.vocab_size}")
        if rows.lse is not None:
            bad = ~np.isfinite(rows.lse)
            self.reject_labels(bad, "lse", "expected finite")
