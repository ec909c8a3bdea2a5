"""What is wrong with a batch of rows, and where: how the rules of the record tell it."""

from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from schemas.errors import RecordError
from schemas.record.rows import LabelRows
from schemas.spec import RecordSpec

Bools = npt.NDArray[np.bool_]

_NEGATIVE_ZERO = np.uint16(0x8000)
_INFINITE = np.uint16(0xFC00)


class Rules:
    """Rows, what they have to be, and the ways to refuse them; the rules are in subclasses."""

    def __init__(self, rows: LabelRows, spec: RecordSpec, vocab_size: int, where: str) -> None:
        self.rows = rows
        self.spec = spec
        self.vocab_size = vocab_size
        self.where = where

    def fail(self, problem: str) -> NoReturn:
        """Raises a RecordError that says where the rows come from."""
        raise RecordError(f"{self.where}: {problem}" if self.where else problem)

    def refuse_labels(self, bad: Bools, column: str, expected: str, first: int = 0) -> None:
        """Fails if any of a run of positions is bad, or, where bad is [n, m], any value of one.

        `first` is the position that ``bad[0]`` is about.
        """
        if not bad.any():
            return
        if bad.ndim == 2:
            bad = np.logical_or.reduce(bad, axis=1)
        self.refuse_label(first + int(np.argmax(bad)), column, expected)

    def refuse_label(self, at: int, column: str, expected: str) -> NoReturn:
        """Fails because of a position, counted over all rows."""
        row = int(np.searchsorted(self.rows.label_offsets, at, side="right")) - 1
        values = getattr(self.rows, column)
        if column in ("entry_ids", "entry_logprobs"):
            offsets = have(self.rows.entry_offsets)
            found = brief(values[offsets[at] : offsets[at + 1]])
        elif column == "entry_counts":
            end = int(np.cumsum(have(self.rows.tail_len), dtype=np.int64)[at])
            found = brief(values[end - int(have(self.rows.tail_len)[at]) : end])
        else:
            found = brief(values[at])
        position = at - int(self.rows.label_offsets[row])
        self.fail(f"row {row}, position {position}, column {column}: found {found}; {expected}")

    def refuse_values(self, bad: Bools, column: str, expected: str) -> None:
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

    def outside(self, ids: npt.NDArray[np.int32]) -> Bools:
        """Which ids are not in the vocabulary."""
        # One comparison for both ends: negative numbers are large without their sign.
        return ids.view(np.uint32) >= np.uint32(self.vocab_size)


def is_logprob(values: npt.NDArray[np.float16]) -> Bools:
    """Finite and not positive, by the bits: the sign bit set and no infinity or NaN; or zero."""
    bits = values.view(np.uint16)
    return ((bits >= _NEGATIVE_ZERO) & (bits < _INFINITE)) | (bits == 0)


def magnitude_bits(values: npt.NDArray[np.float16]) -> npt.NDArray[np.uint16]:
    """Integers that rise as log-probabilities fall: their bits, with 0 where -0 is."""
    bits: npt.NDArray[np.uint16] = values.view(np.uint16) | _NEGATIVE_ZERO
    return bits


def have(values: Any) -> Any:
    """An earlier rule has shown that these columns are there; says so to the type checker."""
    assert values is not None
    return values


def brief(values: Any) -> str:
    """A few of the values, for a message."""
    return np.array2string(np.asarray(values), threshold=8, edgeitems=3, separator=", ")
