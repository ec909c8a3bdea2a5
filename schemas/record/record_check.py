"""Base class of the label record's checks: finds the first violation and reports its place."""

from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from schemas.errors import RecordError
from schemas.record.rows import LabelRows, present
from schemas.record.spans import Bools, outside_vocabulary
from schemas.spec import RecordSpec

_NEGATIVE_ZERO = np.uint16(0x8000)
_INFINITE = np.uint16(0xFC00)


class RecordCheck:
    """Holds a batch and its record, and rejects violations; subclasses define the rules."""

    def __init__(self, rows: LabelRows, spec: RecordSpec, vocab_size: int, where: str) -> None:
        self.rows = rows
        self.spec = spec
        self.vocab_size = vocab_size
        self.where = where

    def fail(self, problem: str) -> NoReturn:
        """Raises a RecordError that names the source of the rows."""
        raise RecordError(f"{self.where}: {problem}" if self.where else problem)

    def reject_labels(self, bad: Bools, column: str, expected: str, first: int = 0) -> None:
        """Fails if any of n consecutive positions is bad.

        Args:
            bad: [n], or [n, m] for m values per position.
            column: the column to show in the message.
            expected: the violated rule.
            first: position of ``bad[0]``, counted over all rows.
        """
        if not bad.any():
            return
        if bad.ndim == 2:
            bad = np.logical_or.reduce(bad, axis=1)
        self.reject_label(first + int(np.argmax(bad)), column, expected)

    def reject_label(self, at: int, column: str, expected: str) -> NoReturn:
        """Fails for a position, counted over all rows."""
        row = int(np.searchsorted(self.rows.label_offsets, at, side="right")) - 1
        values = getattr(self.rows, column)
        if column in ("entry_ids", "entry_logprobs"):
            offsets = present(self.rows.entry_offsets)
            found = preview(values[offsets[at] : offsets[at + 1]])
        elif column == "entry_counts":
            end = int(np.cumsum(present(self.rows.tail_len), dtype=np.int64)[at])
            found = preview(values[end - int(present(self.rows.tail_len)[at]) : end])
        else:
            found = preview(values[at])
        position = at - int(self.rows.label_offsets[row])
        self.fail(f"row {row}, position {position}, column {column}: found {found}; {expected}")

    def reject_values(self, bad: Bools, column: str, expected: str) -> None:
        """Fails if any value of a per-row list column is bad."""
        if not bad.any():
            return
        at = int(np.argmax(bad))
        offsets = self.rows.row_offsets(column)
        row = int(np.searchsorted(offsets, at, side="right")) - 1
        found = getattr(self.rows, column)[at]
        self.fail(
            f"row {row}, value {at - int(offsets[row])}, column {column}: found {found}; {expected}"
        )

    def outside(self, ids: npt.NDArray[np.int32]) -> Bools:
        """Marks ids outside the vocabulary."""
        return outside_vocabulary(ids, self.vocab_size)

    @property
    def id_range(self) -> str:
        """The rule for ids, for error messages."""
        return f"expected ids in [0, {self.vocab_size})"


def is_valid_logprob(values: npt.NDArray[np.float16]) -> Bools:
    """Marks values that are finite and not positive: zero, or negative but not -inf or NaN."""
    bits = values.view(np.uint16)
    return ((bits >= _NEGATIVE_ZERO) & (bits < _INFINITE)) | (bits == 0)


def descending_bits(values: npt.NDArray[np.float16]) -> npt.NDArray[np.uint16]:
    """Bit patterns that increase as log-probabilities decrease; 0 and -0 map to the same one."""
    bits: npt.NDArray[np.uint16] = values.view(np.uint16) | _NEGATIVE_ZERO
    return bits


def preview(values: Any) -> str:
    """Formats the first and last few values, for error messages."""
    return np.array2string(np.asarray(values), threshold=8, edgeitems=3, separator=", ")
