"""`validate`: what always holds in the label record. Checked on every batch before it is written.

Whole arrays at a time. A first pass per rule finds whether it is broken anywhere; only then is the
place worked out for the message.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.columns import COLUMNS
from schemas.errors import RecordError
from schemas.rows import LabelRows
from schemas.spec import RecordSpec

# How far float32 arithmetic of a teacher may be from a sum of exactly one.
MASS_SLACK = 1e-3
# Entries that are checked together, so that the temporary arrays stay in the CPU's cache.
CHUNK_ENTRIES = 1 << 17

_DTYPES = {
    "row_key": np.uint8,
    "content_key": np.uint8,
    "head_len": np.uint16,
    "tail_len": np.uint16,
    "entry_logprobs": np.float16,
    "entry_counts": np.uint8,
    "tail_logmass": np.float16,
    "target_logprob": np.float16,
    "entropy": np.float16,
    "lse": np.float16,
}
# exp of each float16 by its bits: four times as fast as widening it and taking the exp.
with np.errstate(over="ignore", invalid="ignore"):
    _EXP = np.exp(np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32))

_Bools = npt.NDArray[np.bool_]
_NEGATIVE_ZERO = np.uint16(0x8000)
_INFINITE = np.uint16(0xFC00)


def validate(rows: LabelRows, spec: RecordSpec, vocab_size: int, where: str = "") -> None:
    """Checks every invariant of the record.

    Token ids and entry ids are ids of the vocabulary; spans are rising, disjoint and inside the
    row; every array is as long as the others say; heads have the length that the spec asks for,
    each id once, by falling log-probability; log-probabilities are finite and not positive; head
    and tail mass sum to one within what rounding can do; the target's log-probability and rank
    agree with its entry, where it has one (labels that are off by one position fail here).

    Args:
        rows: the batch.
        spec: what the rows have to be.
        vocab_size: V; ids are in [0, V).
        where: put in front of the message, for example the name of the shard.

    Raises:
        RecordError: naming `where`, the row in the batch, the position in the row, and the column.
    """
    check = _Check(rows, spec, vocab_size, where)
    check.shapes()
    check.tokens_and_spans()
    if spec.kind != "tokens":
        check.lengths()
        check.per_label()
        check.entries()


class _Check:
    def __init__(self, rows: LabelRows, spec: RecordSpec, vocab_size: int, where: str) -> None:
        self.rows = rows
        self.spec = spec
        self.vocab_size = vocab_size
        self.where = where

    # What is broken, and where

    def fail(self, problem: str) -> None:
        raise RecordError(f"{self.where}: {problem}" if self.where else problem)

    def refuse_labels(self, bad: _Bools, column: str, expected: str, first: int = 0) -> None:
        """Fails if any of a run of positions is bad, or, where bad is [n, m], any value of one.

        `first` is the position that ``bad[0]`` is about.
        """
        if not bad.any():
            return
        if bad.ndim == 2:
            bad = np.logical_or.reduce(bad, axis=1)
        at = first + int(np.argmax(bad))
        row = int(np.searchsorted(self.rows.label_offsets, at, side="right")) - 1
        values = getattr(self.rows, column)
        if column in ("entry_ids", "entry_logprobs"):
            offsets = _have(self.rows.entry_offsets)
            found = _brief(values[offsets[at] : offsets[at + 1]])
        else:
            found = _brief(values[at])
        position = at - int(self.rows.label_offsets[row])
        self.fail(f"row {row}, position {position}, column {column}: found {found}; {expected}")

    def refuse_values(self, bad: _Bools, column: str, expected: str) -> None:
        """Fails if any value of a column that goes by the row is bad."""
        if not bad.any():
            return
        at = int(np.argmax(bad))
        offsets = self.rows.row_offsets(column)
        row = int(np.searchsorted(offsets, at, side="right")) - 1
        found = getattr(self.rows, column)[at]
        self.fail(
            f"row {row}, value {at - int(offsets[row])}, column {column}: found {found}; {expected}"
        )

    # The rules

    def shapes(self) -> None:
        rows, spec = self.rows, self.spec
        for name in COLUMNS:
            values = getattr(rows, name, None)
            if name in ("num_tokens", "num_labels"):
                continue
            if (values is not None) != (name in spec.columns):
                state = "missing" if values is None else "there"
                self.fail(f"column {name} is {state}, against the record spec {spec.columns}")
            if values is not None and values.dtype != _DTYPES.get(name, np.int32):
                wanted = np.dtype(_DTYPES.get(name, np.int32))
                self.fail(f"column {name} has dtype {values.dtype}; expected {wanted}")
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
            self.fail(f"{name}: expected to rise from 0 to {end}, found {_brief(values)}")

    def tokens_and_spans(self) -> None:
        rows = self.rows
        self.refuse_values(
            self.outside(rows.token_ids), "token_ids", f"expected ids in [0, {self.vocab_size})"
        )
        if rows.teacher_context is not None:
            bad = self.outside(rows.teacher_context)
            self.refuse_values(bad, "teacher_context", f"expected ids in [0, {self.vocab_size})")
        if (np.diff(rows.token_offsets) < 1).any():
            row = int(np.argmax(np.diff(rows.token_offsets) < 1))
            self.fail(f"row {row}, column token_ids: found no token; expected at least one")
        if (rows.span_offsets % 2).any():
            row = int(np.argmax(rows.span_offsets % 2)) - 1
            self.fail(f"row {row}, column label_spans: found an odd count; expected [start, end)")
        self.spans()

    def spans(self) -> None:
        rows = self.rows
        spans = rows.label_spans
        rising = np.diff(spans, prepend=np.int32(0))
        # Inside a span it has to rise; from one span to the next it may stay; a row starts afresh.
        first = rows.span_offsets[:-1][np.diff(rows.span_offsets) > 0]
        rising[first] = spans[first]
        bad: _Bools = np.asarray(rising < (np.arange(len(spans)) % 2))
        bad[first] |= spans[first] < 1
        self.refuse_values(
            bad, "label_spans", "expected rising, disjoint [start, end) with start >= 1"
        )
        lengths = np.repeat(np.diff(rows.token_offsets), np.diff(rows.span_offsets))
        self.refuse_values(spans > lengths, "label_spans", "expected ends within the row's tokens")
        counts = np.concatenate([[0], np.cumsum(spans[1::2].astype(np.int64) - spans[0::2])])
        if not np.array_equal(rows.label_offsets, counts[rows.span_offsets // 2]):
            self.fail("label_offsets: expected the number of positions that label_spans cover")

    def lengths(self) -> None:
        rows, spec = self.rows, self.spec
        for name in ("head_len", "tail_len", "tail_logmass", "target_logprob", "target_rank"):
            self.shape(name, (rows.num_labels,))
        if rows.entropy is not None:
            self.shape("entropy", (rows.num_labels,))
        if rows.lse is not None:
            self.shape("lse", (rows.num_labels, len(spec.temperatures)))
        head, tail = _have(rows.head_len), _have(rows.tail_len)
        wanted = min(spec.k, self.vocab_size)
        self.refuse_labels(
            head != wanted, "head_len", f'expected {wanted}, the k of kind "{spec.kind}"'
        )
        self.refuse_labels(tail != 0, "tail_len", f'expected 0 for kind "{spec.kind}"')
        offsets = np.concatenate([[0], np.cumsum(head.astype(np.int64) + tail)])
        if not np.array_equal(_have(rows.entry_offsets), offsets):
            self.fail("entry_offsets: expected the running sum of head_len + tail_len")
        self.shape("entry_ids", (int(offsets[-1]),))
        self.shape("entry_logprobs", (int(offsets[-1]),))

    def shape(self, name: str, expected: tuple[int, ...]) -> None:
        found = getattr(self.rows, name).shape
        if found != expected:
            self.fail(f"column {name} has shape {found}; expected {expected} from spans and heads")

    def per_label(self) -> None:
        rows = self.rows
        for name in ("tail_logmass", "target_logprob"):
            bad = ~_is_logprob(getattr(rows, name))
            self.refuse_labels(bad, name, "expected finite and not positive")
        rank = _have(rows.target_rank)
        bad = (rank < 1) | (rank > self.vocab_size)
        self.refuse_labels(bad, "target_rank", f"expected 1 to {self.vocab_size}")
        if rows.entropy is not None:
            # Above the highest entropy by what rounding may add.
            highest = np.log(self.vocab_size) * (1 + 2.0**-self.spec.logprob_bits) + 0.01
            bad = ~((rows.entropy >= 0) & (rows.entropy <= highest))
            self.refuse_labels(bad, "entropy", f"expected 0 to log {self.vocab_size}")
        if rows.lse is not None:
            bad = ~np.isfinite(rows.lse)
            self.refuse_labels(bad, "lse", "expected finite")

    def entries(self) -> None:
        rows, offsets = self.rows, _have(self.rows.entry_offsets)
        targets = self.target_ids()
        width = min(self.spec.k, self.vocab_size)
        step = max(1, CHUNK_ENTRIES // width)
        for first in range(0, rows.num_labels, step):
            last = min(first + step, rows.num_labels)
            part = slice(offsets[first], offsets[last])
            ids = _have(rows.entry_ids)[part].reshape(-1, width)
            logprobs = _have(rows.entry_logprobs)[part].reshape(-1, width)
            self.entry_ids(ids, first)
            self.entry_logprobs(logprobs, first)
            self.entry_mass(logprobs, _have(rows.tail_logmass)[first:last], first)
            self.entry_of_target(ids, logprobs, targets[first:last], first)

    def entry_ids(self, ids: npt.NDArray[np.int32], first: int) -> None:
        rule = f"expected ids in [0, {self.vocab_size})"
        self.refuse_labels(self.outside(ids), "entry_ids", rule, first)
        ordered = np.sort(ids, axis=1)
        twice = ordered[:, 1:] == ordered[:, :-1]
        self.refuse_labels(twice, "entry_ids", "expected each id once", first)

    def entry_logprobs(self, logprobs: npt.NDArray[np.float16], first: int) -> None:
        bad = ~_is_logprob(logprobs)
        self.refuse_labels(bad, "entry_logprobs", "expected finite and not positive", first)
        # The bits of negative floats rise with the magnitude; 0 is put where -0 is.
        bits = logprobs.view(np.uint16) | _NEGATIVE_ZERO
        bad = bits[:, 1:] < bits[:, :-1]
        self.refuse_labels(bad, "entry_logprobs", "expected a falling order", first)

    def entry_mass(
        self, logprobs: npt.NDArray[np.float16], tail: npt.NDArray[np.float16], first: int
    ) -> None:
        """Head and tail mass sum to one.

        A log-probability l was rounded by at most |l| * 2^-(bits + 1), which changes its
        probability p by at most about p * |l| * 2^-(bits + 1).
        """
        total = _EXP.take(logprobs.view(np.uint16)).sum(axis=1) + _EXP.take(tail.view(np.uint16))
        if (np.abs(total - 1.0) <= MASS_SLACK).all():
            return
        wide, wide_tail = logprobs.astype(np.float32), tail.astype(np.float32)
        moved = -((np.exp(wide) * wide).sum(axis=1) + np.exp(wide_tail) * wide_tail)
        moved *= 2.0 ** -(self.spec.logprob_bits + 1)
        bad = np.abs(total - 1.0) > 1.1 * moved + MASS_SLACK
        rule = "expected head and tail_logmass to sum to a probability of 1"
        if bad.any():
            rule += f", found a sum of {float(total[np.argmax(bad)]):.5f}"
        self.refuse_labels(bad, "entry_logprobs", rule, first)

    def entry_of_target(
        self,
        ids: npt.NDArray[np.int32],
        logprobs: npt.NDArray[np.float16],
        targets: npt.NDArray[np.int32],
        first: int,
    ) -> None:
        """The target's own columns agree with its entry, or with there being none."""
        is_target = ids == targets[:, None]
        index = np.argmax(is_target, axis=1)
        here = np.arange(len(ids))
        present = is_target[here, index]
        entry = np.where(present, logprobs[here, index], logprobs[:, -1]).astype(np.float32)
        part = slice(first, first + len(ids))
        target = _have(self.rows.target_logprob)[part].astype(np.float32)
        slack = np.abs(entry) * 2.0**-self.spec.logprob_bits + MASS_SLACK
        above = target - entry
        bad = np.where(present, np.abs(above) > slack, above > slack)
        rule = "expected that of the target's entry, or below the head where it has none"
        self.refuse_labels(bad, "target_logprob", rule, first)
        bad = present & (_have(self.rows.target_rank)[part] > index + 1)
        rule = "expected at most the place of the target's entry in the head"
        self.refuse_labels(bad, "target_rank", rule, first)

    def target_ids(self) -> npt.NDArray[np.int32]:
        """int32 [sum N]: the token that stands at each target index."""
        rows = self.rows
        starts = rows.label_spans[0::2].astype(np.int64)
        lengths = rows.label_spans[1::2] - starts
        begins = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if len(lengths) else lengths
        row_starts = np.repeat(rows.token_offsets[:-1], np.diff(rows.span_offsets) // 2)
        indices = np.arange(rows.num_labels) + np.repeat(row_starts + starts - begins, lengths)
        return rows.token_ids[indices]

    def outside(self, ids: npt.NDArray[np.int32]) -> _Bools:
        # One comparison for both ends: negative numbers are large without their sign.
        return ids.view(np.uint32) >= np.uint32(self.vocab_size)


def _is_logprob(values: npt.NDArray[np.float16]) -> _Bools:
    """Finite and not positive, by the bits: the sign bit set and no infinity or NaN; or zero."""
    bits = values.view(np.uint16)
    return ((bits >= _NEGATIVE_ZERO) & (bits < _INFINITE)) | (bits == 0)


def _have(values: Any) -> Any:
    """`shapes` has shown that these columns are there; says so to the type checker."""
    assert values is not None
    return values


def _brief(values: Any) -> str:
    return np.array2string(np.asarray(values), threshold=8, edgeitems=3, separator=", ")
