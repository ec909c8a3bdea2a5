"""`LabelRows`: a batch of rows as flat arrays in CSR layout, used by labeler and trainer."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.errors import RecordError
from schemas.record.columns import COLUMNS, Length, arrow_schema
from schemas.record.key_columns import key_column, key_values
from schemas.record.spans import (
    Int64s,
    label_offsets,
    offsets_of,
    target_positions,
)
from schemas.spec import RecordSpec

Int32s = npt.NDArray[np.int32]
Halves = npt.NDArray[np.float16]

MAX_LIST_VALUES = 2**31 - 1


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelRows:
    """R rows of L tokens and N labelled positions (varying by row) of E entries (by position).

    Label columns are None for kind ``tokens`` and if they were not read. Arrays may be read-only
    views of a file's buffers, which they keep alive.

    Attributes:
        row_key: uint8 [R, 16].
        content_key: uint8 [R, 16].
        token_ids: int32 [sum L].
        token_offsets: int64 [R + 1], into `token_ids`.
        label_spans: int32 [2 * spans], flat half-open [start, end) pairs of target indices.
        span_offsets: int64 [R + 1], into `label_spans`, so always even.
        label_offsets: int64 [R + 1], into every [sum N] array; by default derived from the spans.
        head_len: uint16 [sum N], number of exact entries per position.
        tail_len: uint16 [sum N], number of tail draws per position.
        entry_offsets: int64 [sum N + 1], into the entries; by default derived from the two above.
        entry_ids: int32 [sum E].
        entry_logprobs: float16 [sum E], nats, temperature 1.
        entry_counts: uint8 [sum tail_len], how often each tail entry was drawn.
        tail_logmass: float16 [sum N], nats.
        target_logprob: float16 [sum N], nats.
        target_rank: int32 [sum N], from 1.
        entropy: float16 [sum N], nats.
        lse: float16 [sum N, number of temperatures].
        teacher_context: int32, tokens that only the teacher saw.
        context_offsets: int64 [R + 1], into `teacher_context`.
    """

    row_key: npt.NDArray[np.uint8]
    content_key: npt.NDArray[np.uint8]
    token_ids: Int32s
    token_offsets: Int64s
    label_spans: Int32s
    span_offsets: Int64s
    label_offsets: Int64s = None  # type: ignore[assignment]  # filled in by __post_init__
    head_len: npt.NDArray[np.uint16] | None = None
    tail_len: npt.NDArray[np.uint16] | None = None
    entry_offsets: Int64s | None = None
    entry_ids: Int32s | None = None
    entry_logprobs: Halves | None = None
    entry_counts: npt.NDArray[np.uint8] | None = None
    tail_logmass: Halves | None = None
    target_logprob: Halves | None = None
    target_rank: Int32s | None = None
    entropy: Halves | None = None
    lse: Halves | None = None
    teacher_context: Int32s | None = None
    context_offsets: Int64s | None = None

    def __post_init__(self) -> None:
        if self.label_offsets is None:
            if len(self.label_spans) % 2:
                found = len(self.label_spans)
                raise RecordError(f"label_spans has {found} values; expected [start, end) pairs")
            offsets = label_offsets(self.label_spans, self.span_offsets)
            object.__setattr__(self, "label_offsets", offsets)
        if self.entry_offsets is None and self.head_len is not None and self.tail_len is not None:
            offsets = offsets_of(self.head_len.astype(np.int64) + self.tail_len)
            object.__setattr__(self, "entry_offsets", offsets)

    def __len__(self) -> int:
        return len(self.row_key)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all rows."""
        return int(self.token_offsets[-1])

    @property
    def num_labels(self) -> int:
        """Number of labelled positions in all rows."""
        return int(self.label_offsets[-1])

    @property
    def num_entries(self) -> int:
        """Number of exact entries and draws at all positions; 0 without a teacher."""
        return 0 if self.entry_offsets is None else int(self.entry_offsets[-1])

    @property
    def num_bytes(self) -> int:
        """Size of all arrays in bytes."""
        arrays = (getattr(self, field.name) for field in _FIELDS)
        return sum(array.nbytes for array in arrays if array is not None)

    def target_ids(self) -> Int32s:
        """int32 [sum N]: the token at each target index."""
        indices, offsets = target_positions(self.label_spans, self.span_offsets)
        return self.token_ids[indices + np.repeat(self.token_offsets[:-1], np.diff(offsets))]

    def slice(self, start: int, stop: int) -> "LabelRows":
        """Returns rows [start, stop) as views of these arrays."""
        start, stop, _ = slice(start, stop).indices(len(self))
        stop = max(start, stop)
        return LabelRows(**{field.name: self._cut(field.name, start, stop) for field in _FIELDS})

    def take(self, indices: npt.NDArray[np.integer[Any]]) -> "LabelRows":
        """Copies the rows with the given indices, in the given order."""
        numbers = indices.tolist()
        return LabelRows.gather([self] * len(numbers), numbers) if numbers else self.slice(0, 0)

    @staticmethod
    def gather(parts: Sequence["LabelRows"], numbers: Sequence[int]) -> "LabelRows":
        """Copies one row of each part; a part may occur several times.

        Concatenates slices column by column, which are plain memory copies. Fancy indexing would
        first build an index as large as the values.

        Args:
            parts: at least one batch, all with the same columns.
            numbers: index of the row in each part, not negative.
        """
        values: dict[str, Any] = {}
        for name in parts[0]._row_bounds:
            bounds = [part._row_bounds[name] for part in parts]
            spans = [(bound[n], bound[n + 1]) for bound, n in zip(bounds, numbers, strict=True)]
            values[name] = np.concatenate(
                [getattr(part, name)[a:b] for part, (a, b) in zip(parts, spans, strict=True)]
            )
            if name in _OWN_OFFSETS:
                values[_OWN_OFFSETS[name]] = np.cumsum([0, *(b - a for a, b in spans)])
        return LabelRows(**values)

    @staticmethod
    def concat(parts: Sequence["LabelRows"]) -> "LabelRows":
        """Concatenates batches.

        Raises:
            RecordError: `parts` is empty, or their columns differ.
        """
        if not parts:
            raise RecordError("no rows to concatenate; expected at least one batch")
        return LabelRows(**{field.name: _concatenated(field.name, parts) for field in _FIELDS})

    def to_table(self, spec: RecordSpec) -> pa.Table:
        """Returns an Arrow table in the schema of `spec`, which shares memory with these arrays.

        Raises:
            RecordError: a column of the spec is missing, or is too long for an Arrow list.
        """
        arrays = [self._arrow_column(name) for name in spec.columns]
        return pa.Table.from_arrays(arrays, schema=arrow_schema(spec))

    @staticmethod
    def from_table(table: pa.Table, spec: RecordSpec) -> "LabelRows":
        """Reads rows from an Arrow table; copies only if it has several chunks.

        Missing label columns become None. Of TOKEN_COLUMNS, only the two counts may be missing,
        since they follow from the others.

        Raises:
            RecordError: a token column is missing, or a column has a wrong type or nulls.
        """
        known = [name for name in spec.columns if name in table.column_names]
        columns = {name: _one_chunk(table, name) for name in known}
        missing = [name for name in _REQUIRED if name not in columns]
        if missing:
            raise RecordError(
                f"the table lacks {', '.join(missing)}; its columns are {table.column_names}"
            )
        values: dict[str, Any] = {}
        found_offsets: dict[str, Int64s] = {}
        for name, column in columns.items():
            length = COLUMNS[name].length
            if length is not Length.ROW:
                values[name], found_offsets[name] = _list_values(column)
                if name in _OWN_OFFSETS:
                    values[_OWN_OFFSETS[name]] = found_offsets[name]
            elif name in ("row_key", "content_key"):
                values[name] = key_values(column)
        if "lse" in values:
            values["lse"] = values["lse"].reshape(-1, len(spec.temperatures))
        rows = LabelRows(**values)
        rows._check_lengths(found_offsets)
        return rows

    def _check_lengths(self, found: dict[str, Int64s]) -> None:
        """Rejects lists whose lengths do not match the spans: labels would shift along rows."""
        for name, offsets in found.items():
            if COLUMNS[name].length in (Length.ENTRIES, Length.DRAWS) and self.head_len is None:
                continue
            expected = self.row_offsets(name)
            if name == "lse" and self.lse is not None:
                expected = expected * self.lse.shape[1]
            if not np.array_equal(offsets, expected):
                raise RecordError(
                    f"column {name}: list lengths do not match label_spans, head_len and tail_len; "
                    f"expected {COLUMNS[name].length.value}"
                )

    def row_offsets(self, name: str) -> Int64s:
        """int64 [R + 1]: offsets of the rows in a list column."""
        length = COLUMNS[name].length
        if name in _OWN_OFFSETS:
            offsets = getattr(self, _OWN_OFFSETS[name])
        elif length is Length.LABELS or length is Length.TEMPERATURES:
            offsets = self.label_offsets
        elif length is Length.ENTRIES and self.entry_offsets is not None:
            offsets = self.entry_offsets[self.label_offsets]
        elif length is Length.DRAWS and self.tail_len is not None:
            offsets = offsets_of(self.tail_len)[self.label_offsets]
        else:
            offsets = None
        if offsets is None:
            raise RecordError(f"column {name} was read without the columns that give its lengths")
        return offsets

    @cached_property
    def _row_bounds(self) -> dict[str, Sequence[int]]:
        """Offsets of the rows in every column, as Python integers, which slice faster."""
        return {
            name: range(len(self) + 1)
            if COLUMNS[name].length is Length.ROW
            else self.row_offsets(name).tolist()
            for name in _VALUES
            if getattr(self, name) is not None
        }

    def _cut(self, name: str, start: int, stop: int) -> Any:
        values = getattr(self, name)
        if values is None:
            return None
        if name == "entry_offsets":
            low, high = self.label_offsets[start], self.label_offsets[stop]
            return values[low : high + 1] - values[low]
        if name.endswith("_offsets"):
            return values[start : stop + 1] - values[start]
        if COLUMNS[name].length is Length.ROW:
            return values[start:stop]
        offsets = self.row_offsets(name)
        return values[offsets[start] : offsets[stop]]

    def _arrow_column(self, name: str) -> pa.Array:
        if name == "num_tokens":
            return pa.array(np.diff(self.token_offsets).astype(np.int32))
        if name == "num_labels":
            return pa.array(np.diff(self.label_offsets).astype(np.int32))
        values = getattr(self, name)
        if values is None:
            raise RecordError(f"column {name} is missing, but the record spec requires it")
        if COLUMNS[name].length is Length.ROW:
            return key_column(values)
        offsets = self.row_offsets(name)
        if COLUMNS[name].length is Length.TEMPERATURES:
            offsets = offsets * values.shape[1]
        if offsets[-1] > MAX_LIST_VALUES:
            raise RecordError(f"column {name} has {offsets[-1]} values, over {MAX_LIST_VALUES}")
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        return pa.ListArray.from_arrays(
            pa.array(offsets.astype(np.int32)), flat, type=COLUMNS[name].field().type
        )


_FIELDS = fields(LabelRows)
_VALUES = tuple(field.name for field in _FIELDS if not field.name.endswith("_offsets"))
_REQUIRED = ("row_key", "content_key", "token_ids", "label_spans")
_OWN_OFFSETS = {
    "token_ids": "token_offsets",
    "label_spans": "span_offsets",
    "teacher_context": "context_offsets",
}


def present(values: Any) -> Any:
    """Asserts that an optional column is set, for the type checker."""
    assert values is not None
    return values


def _concatenated(name: str, parts: Sequence[LabelRows]) -> Any:
    values = [getattr(part, name) for part in parts]
    absent = sum(value is None for value in values)
    if absent == len(values):
        return None
    if absent:
        raise RecordError(f"column {name} is missing in {absent} of {len(values)} batches")
    if not name.endswith("_offsets"):
        return np.concatenate(values)
    shifts = np.cumsum([0] + [value[-1] for value in values[:-1]])
    moved = [value[1:] + shift for value, shift in zip(values, shifts, strict=True)]
    return np.concatenate([np.zeros(1, np.int64), *moved])


def _one_chunk(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    expected = COLUMNS[name].field().type
    if column.type != expected:
        raise RecordError(f"column {name} has type {column.type}; expected {expected}")
    if column.null_count:
        raise RecordError(f"column {name} holds {column.null_count} nulls; expected none")
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _list_values(column: pa.ListArray) -> tuple[npt.NDArray[Any], Int64s]:
    """Values, and offsets from 0, of a list array, which may be a slice of a longer one."""
    if not len(column):
        return column.values.slice(0, 0).to_numpy(), np.zeros(1, np.int64)
    offsets = column.offsets.to_numpy().astype(np.int64)
    values = column.values.slice(offsets[0], offsets[-1] - offsets[0])
    if values.null_count:
        raise RecordError(f"a list column holds {values.null_count} null elements; expected none")
    return values.to_numpy(), offsets - offsets[0]
