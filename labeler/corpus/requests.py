"""Requests that the tokenising tasks send to the teachers, as Arrow.

A request is one window to label, or one sample to generate and then label. Its key determines
whether it is already labelled; its place identifies its corpus row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from labeler.corpus.windows import Int32Array
from schemas.keys import generated_row_key, place_key, row_key, stack_keys, unit_key
from schemas.label_set.label_set import QuarantineRow
from schemas.record.spans import offsets_of
from schemas.spec import GenerationSpec

NOT_GENERATED = -1
"""The sample index of rows that are not generated."""

_INT32_LIST = pa.list_(pa.field("element", pa.int32(), nullable=False))
_FIELDS = (
    ("row_key", pa.binary(16)),
    ("token_ids", _INT32_LIST),
    ("label_spans", _INT32_LIST),
    ("source", pa.string()),
    ("place", pa.int64()),
    ("window", pa.int32()),
    ("sample", pa.int32()),
)
REQUEST_SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for name, kind in _FIELDS])


@dataclass(frozen=True, eq=False)
class Request:
    """One sequence to label, or one prompt to continue and then label.

    Attributes:
        row_key: 16 bytes.
        token_ids: int32 [L]; only the prompt until its response is generated.
        label_spans: int32, flat [start, end) pairs of target indices; empty for a prompt.
        source, place, window: Its origin; see ``listing`` and ``windows``.
        sample: Index of the response to the prompt; -1 if nothing is generated.
    """

    row_key: bytes
    token_ids: Int32Array
    label_spans: Int32Array
    source: str
    place: int
    window: int = 0
    sample: int = NOT_GENERATED

    def with_response(self, response: Int32Array) -> "Request":
        """Returns the request to label a response after its prompt.

        Args:
            response: int32 [at least 1], without the prompt.
        """
        start = len(self.token_ids)
        ids = np.concatenate([self.token_ids, np.asarray(response, np.int32)])
        return replace(self, token_ids=ids, label_spans=np.array([start, len(ids)], np.int32))

    def quarantined(self, reason: str, detail: str) -> QuarantineRow:
        """The quarantine row of a request that cannot be labelled."""
        return QuarantineRow(self.row_key, self.source, self.place, self.window, reason, detail)

    def seed(self) -> int:
        """The seed of this sample, in [0, 2**31); the same in every run."""
        return int.from_bytes(self.row_key[:4], "little") >> 1


def label_request(
    token_ids: Int32Array, spans: Int32Array, source: str, place: int, window: int
) -> Request:
    """A request to label a sequence, keyed by its content."""
    return Request(row_key(token_ids, spans), token_ids, spans, source, place, window)


def sample_requests(
    prompt_ids: Int32Array, generation: GenerationSpec, source: str, place: int
) -> list[Request]:
    """The requests for all samples of a prompt, keyed by their generation settings."""
    keys = [generated_row_key(prompt_ids, generation, n) for n in range(generation.n)]
    no_spans = np.empty(0, np.int32)
    return [
        Request(key, prompt_ids, no_spans, source, place, sample=sample)
        for sample, key in enumerate(keys)
    ]


def to_table(requests: Sequence[Request]) -> pa.Table:
    """Requests as Arrow, in order."""
    columns = []
    for name, kind in _FIELDS:
        values = [getattr(request, name) for request in requests]
        columns.append(_list_array(values) if kind == _INT32_LIST else pa.array(values, kind))
    return pa.Table.from_arrays(columns, schema=REQUEST_SCHEMA)


def from_table(table: pa.Table) -> list[Request]:
    """The requests of a table; their arrays are views of its memory."""
    columns: list[Any] = []
    for name, kind in _FIELDS:
        column = table.column(name)
        if kind == _INT32_LIST:
            columns.append([row for chunk in column.chunks for row in _list_rows(chunk)])
        else:
            columns.append(column.to_pylist())
    return [Request(*values) for values in zip(*columns, strict=True)]


def requests_unit_key(requests: Sequence[Request], salt: str = "") -> str:
    """The key of the unit of these requests, independent of their outcomes.

    Args:
        requests: One or more.
        salt: Set to retry quarantined rows: without it they would map to their old unit, which is
            already committed with these rows in quarantine.
    """
    keys = [request.row_key for request in requests]
    return unit_key(stack_keys([*keys, place_key(salt, 0, 0)] if salt else keys))


def _list_array(arrays: Sequence[Int32Array]) -> pa.ListArray:
    values = np.concatenate(arrays) if arrays else np.empty(0, np.int32)
    return pa.ListArray.from_arrays(
        pa.array(offsets_of(np.array([len(array) for array in arrays], np.int64)), pa.int32()),
        pa.array(values.astype(np.int32, copy=False)),
        type=_INT32_LIST,
    )


def _list_rows(chunk: pa.ListArray) -> list[Int32Array]:
    values, offsets = chunk.values.to_numpy(), chunk.offsets.to_numpy()
    return [values[offsets[i] : offsets[i + 1]] for i in range(len(chunk))]
