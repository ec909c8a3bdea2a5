"""The columns of the label record. A column exists only if it is declared here.

Alignment: label j of a row describes the teacher's distribution **over** the token at target index
``t_j``, computed from the tokens before ``t_j``. The student's loss for it uses the hidden state at
``t_j - 1``.

No column or list element is nullable, which halves the cost of writing and cuts the cost of reading
to a third. Optional data is present or absent as an entire column.
"""

from dataclasses import dataclass
from enum import Enum

import pyarrow as pa

from schemas.spec import SCHEMA_VERSION, RecordSpec


class Length(Enum):
    """Number of values per row in a column."""

    ROW = "one value"
    TOKENS = "L, the number of tokens"
    SPANS = "two for each span"
    LABELS = "N, the number of labelled positions"
    ENTRIES = "head_len + tail_len, summed over the positions"
    DRAWS = "tail_len, summed over the positions"
    TEMPERATURES = "N times the number of temperatures, position by position"
    FREE = "any number"


@dataclass(frozen=True)
class Column:
    """A column: name, Arrow type of a value, number of values per row, meaning."""

    name: str
    value_type: pa.DataType
    length: Length
    doc: str

    def field(self) -> pa.Field:
        """The Arrow field: the value type or a list of it, not nullable."""
        if self.length is Length.ROW:
            return pa.field(self.name, self.value_type, nullable=False)
        element = pa.field("element", self.value_type, nullable=False)
        return pa.field(self.name, pa.list_(element), nullable=False)


_TABLE = (
    Column("row_key", pa.binary(16), Length.ROW, "identity of the labelled request"),
    Column(
        "content_key",
        pa.binary(16),
        Length.ROW,
        "hash of token ids and spans only; joins label sets of different teachers",
    ),
    Column(
        "token_ids",
        pa.int32(),
        Length.TOKENS,
        "the sequence as the student sees it, prompt and response",
    ),
    Column(
        "label_spans",
        pa.int32(),
        Length.SPANS,
        "half-open [start, end) pairs of target indices, ascending and disjoint, start >= 1",
    ),
    Column("num_tokens", pa.int32(), Length.ROW, "L"),
    Column("num_labels", pa.int32(), Length.ROW, "N, the sum of the lengths of the spans"),
    Column("head_len", pa.uint16(), Length.LABELS, "number of exact entries at the position"),
    Column("tail_len", pa.uint16(), Length.LABELS, "number of tail draws at the position"),
    Column(
        "entry_ids",
        pa.int32(),
        Length.ENTRIES,
        "by position: head ids by decreasing teacher probability (ties by id, before rounding), "
        "then tail draws; each id once",
    ),
    Column(
        "entry_logprobs",
        pa.float16(),
        Length.ENTRIES,
        "the teacher's log-probability of each entry, nats, at temperature 1",
    ),
    Column("entry_counts", pa.uint8(), Length.DRAWS, "number of times each tail entry was drawn"),
    Column(
        "tail_logmass",
        pa.float16(),
        Length.LABELS,
        "log of the teacher's probability mass outside the head, nats",
    ),
    Column(
        "target_logprob",
        pa.float16(),
        Length.LABELS,
        "the teacher's log-probability of the token in the sequence, nats",
    ),
    Column(
        "target_rank",
        pa.int32(),
        Length.LABELS,
        "1 + number of ids strictly more probable than that token",
    ),
    Column(
        "entropy", pa.float16(), Length.LABELS, "entropy of the full distribution, nats; optional"
    ),
    Column(
        "lse",
        pa.float16(),
        Length.TEMPERATURES,
        "log of the sum over the full vocabulary of p^(1/T), for each T of the spec; optional",
    ),
    Column(
        "teacher_context",
        pa.int32(),
        Length.FREE,
        "tokens before the sequence that only the teacher saw; optional",
    ),
)

COLUMNS: dict[str, Column] = {column.name: column for column in _TABLE}


def arrow_schema(spec: RecordSpec) -> pa.Schema:
    """The Arrow schema of shards of this record."""
    fields = [COLUMNS[name].field() for name in spec.columns]
    return pa.schema(fields, metadata={"tutelage.schema_version": str(SCHEMA_VERSION)})
