"""`LabelRows`: a batch of rows as flat arrays in CSR style, the form that both stages work on."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.errors import RecordError
from schemas.record.columns import COLUMNS, Length, arrow_schema
from schemas.spec import RecordSpec

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]
Halves = npt.NDArray[np.float16]

MAX_LIST_VALUES = 2**31 - 1


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelRows:
    """R rows. L tokens and N labelled positions differ from row to row; E entries by position.

    The columns of labels are None in sets of kind ``tokens``, and where they were not read. Arrays
    may be views of a file's buffers: read-only, and kept alive by this object.

    Attributes:
        row_key: uint8 [R, 16].
        content_key: uint8 [R, 16].
        token_ids: int32 [sum L].
        token_offsets: int64 [R + 1], into `token_ids`.
        label_spans: int32 [2 * spans], flat half-open [start, end) pairs of target indices.
        span_offsets: int64 [R + 1], into `label_spans`, so always even.
        label_offsets: int64 [R + 1], into the positions, that is into every [sum N] array. Worked
            out from the spans where it is not given.
        head_len: uint16 [sum N], exact entries by position.
        tail_len: uint16 [sum N], tail draws by position.
        entry_offsets: int64 [sum N + 1], into the entries. Worked out from the two above.
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
            offsets = _label_offsets(self.label_spans, self.span_offsets)
            object.__setattr__(self, "label_offsets", offsets)
        if self.entry_offsets is None and self.head_len is not None and self.tail_len is not None:
            offsets = offsets_of(self.head_len.astype(np.int64) + self.tail_len)
            object.__setattr__(self, "entry_offsets", offsets)

    def __len__(self) -> int:
        return len(self.row_key)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return int(self.token_offsets[-1])

    @property
    def num_labels(self) -> int:
        """Labelled positions of all rows."""
        return int(self.label_offsets[-1])

    @property
    def num_entries(self) -> int:
        """Exact entries and draws of all positions; 0 where there is no teacher."""
        return 0 if self.entry_offsets is None else int(self.entry_offsets[-1])

    def slice(self, start: int, stop: int) -> "LabelRows":
        """Rows [start, stop) as views of these arrays."""
        start, stop, _ = slice(start, stop).indices(len(self))
        stop = max(start, stop)
        return LabelRows(**{field.name: self._cut(field.name, start, stop) for field in _FIELDS})

    def take(self, indices: npt.NDArray[np.integer[Any]]) -> "LabelRows":
        """The rows with the given numbers, in the given order, as a copy."""
        values: dict[str, Any] = {}
        for field in _FIELDS:
            name, mine = field.name, getattr(self, field.name)
            # The other two kinds of offsets follow from the columns.
            if mine is None or name in ("label_offsets", "entry_offsets"):
                continue
            if name in _OWN_OFFSETS.values():
                values[name] = offsets_of(np.diff(mine)[indices])
            elif COLUMNS[name].length is Length.ROW:
                values[name] = mine[indices]
            else:
                values[name] = mine[_ranges(self.row_offsets(name), indices)]
        return LabelRows(**values)

    @staticmethod
    def concat(parts: Sequence["LabelRows"]) -> "LabelRows":
        """All rows of `parts`, in order.

        Raises:
            RecordError: there are no parts, or they do not have the same columns.
        """
        if not parts:
            raise RecordError("no rows to put together: at least one batch is needed")
        return LabelRows(**{field.name: _joined(field.name, parts) for field in _FIELDS})

    def to_table(self, spec: RecordSpec) -> pa.Table:
        """These rows in the Arrow schema of `spec`, sharing memory with these arrays.

        Raises:
            RecordError: a column of the spec is missing, or one is too long for an Arrow list.
        """
        arrays = [self._arrow_column(name) for name in spec.columns]
        return pa.Table.from_arrays(arrays, schema=arrow_schema(spec))

    @staticmethod
    def from_table(table: pa.Table, spec: RecordSpec) -> "LabelRows":
        """Rows of an Arrow table, chunked, sliced or neither; no copy where it has one chunk.

        Columns of labels that the table does not have are None; those of TOKEN_COLUMNS have to be
        there, but for the two counts, which follow from the others.

        Raises:
            RecordError: a column of the tokens is missing, or one has another type or nulls.
        """
        known = [name for name in spec.columns if name in table.column_names]
        columns = {name: _one_chunk(table, name) for name in known}
        missing = [name for name in _NEEDED if name not in columns]
        if missing:
            raise RecordError(f"the table lacks {', '.join(missing)}; it has {table.column_names}")
        values: dict[str, Any] = {}
        found_offsets: dict[str, Int64s] = {}
        for name, column in columns.items():
            length = COLUMNS[name].length
            if length is not Length.ROW:
                values[name], found_offsets[name] = _list_values(column)
                if name in _OWN_OFFSETS:
                    values[_OWN_OFFSETS[name]] = found_offsets[name]
            elif name in ("row_key", "content_key"):
                values[name] = _key_values(column)
        if "lse" in values:
            values["lse"] = values["lse"].reshape(-1, len(spec.temperatures))
        rows = LabelRows(**values)
        rows._check_lengths(found_offsets)
        return rows

    def _check_lengths(self, found: dict[str, Int64s]) -> None:
        """Lists that have to be of one length are: otherwise labels would slide along the rows."""
        for name, offsets in found.items():
            if COLUMNS[name].length in (Length.ENTRIES, Length.DRAWS) and self.head_len is None:
                continue
            expected = self.row_offsets(name)
            if name == "lse" and self.lse is not None:
                expected = expected * self.lse.shape[1]
            if not np.array_equal(offsets, expected):
                raise RecordError(
                    f"the lists of column {name} do not have {COLUMNS[name].length.value}"
                )

    def row_offsets(self, name: str) -> Int64s:
        """int64 [R + 1]: where the values of each row begin and end in a list column."""
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
            raise RecordError(f"these rows lack the lengths that column {name} goes by")
        return offsets

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
        field = COLUMNS[name].field()
        if name == "num_tokens":
            return pa.array(np.diff(self.token_offsets).astype(np.int32))
        if name == "num_labels":
            return pa.array(np.diff(self.label_offsets).astype(np.int32))
        values = getattr(self, name)
        if values is None:
            raise RecordError(f"column {name} is missing, but the record spec has it")
        if COLUMNS[name].length is Length.ROW:
            buffer = pa.py_buffer(np.ascontiguousarray(values))
            return pa.FixedSizeBinaryArray.from_buffers(field.type, len(values), [None, buffer])
        offsets = self.row_offsets(name)
        if COLUMNS[name].length is Length.TEMPERATURES:
            offsets = offsets * values.shape[1]
        if offsets[-1] > MAX_LIST_VALUES:
            raise RecordError(f"column {name} has {offsets[-1]} values, over {MAX_LIST_VALUES}")
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), flat, type=field.type)


_FIELDS = fields(LabelRows)
_NEEDED = ("row_key", "content_key", "token_ids", "label_spans")
_OWN_OFFSETS = {
    "token_ids": "token_offsets",
    "label_spans": "span_offsets",
    "teacher_context": "context_offsets",
}


def offsets_of(lengths: npt.NDArray[Any]) -> Int64s:
    """int64 [n + 1] from n lengths: the running sum, starting at 0."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _ranges(offsets: Int64s, indices: npt.NDArray[np.integer[Any]]) -> Int64s:
    """int64: the values [offsets[i], offsets[i + 1]) of each i of `indices`, one after another."""
    starts = offsets[indices]
    lengths = offsets[indices + 1] - starts
    ends = offsets_of(lengths)
    return np.arange(ends[-1]) + np.repeat(starts - ends[:-1], lengths)


def target_positions(label_spans: Int32s, span_offsets: Int64s) -> tuple[Int64s, Int64s]:
    """Expands spans to the target indices that they cover.

    Args:
        label_spans: int32 [2 * spans], flat half-open [start, end) pairs.
        span_offsets: int64 [R + 1], into `label_spans`.

    Returns:
        int64 [sum N], target indices within their row, row by row; and int64 [R + 1], the offsets
        of the rows in it.
    """
    starts = label_spans[0::2].astype(np.int64)
    lengths = label_spans[1::2] - starts
    begins = offsets_of(lengths)
    indices = np.arange(begins[-1]) + np.repeat(starts - begins[:-1], lengths)
    return indices, begins[span_offsets // 2]


def _label_offsets(label_spans: Int32s, span_offsets: Int64s) -> Int64s:
    if len(label_spans) % 2:
        raise RecordError(f"label_spans has {len(label_spans)} values; expected [start, end) pairs")
    lengths = label_spans[1::2].astype(np.int64) - label_spans[0::2]
    return offsets_of(lengths)[span_offsets // 2]


def _joined(name: str, parts: Sequence[LabelRows]) -> Any:
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
    """Values and offsets of a list array that may be a slice of a longer one."""
    if not len(column):
        return column.values.slice(0, 0).to_numpy(), np.zeros(1, np.int64)
    offsets = column.offsets.to_numpy().astype(np.int64)
    values = column.values.slice(offsets[0], offsets[-1] - offsets[0])
    if values.null_count:
        raise RecordError(f"a list column holds {values.null_count} null elements; expected none")
    return values.to_numpy(), offsets - offsets[0]


def _key_values(column: pa.FixedSizeBinaryArray) -> npt.NDArray[np.uint8]:
    width = column.type.byte_width
    if not len(column):
        return np.empty((0, width), np.uint8)
    raw = np.frombuffer(column.buffers()[1], np.uint8)
    first = column.offset * width
    return raw[first : first + len(column) * width].reshape(-1, width)
