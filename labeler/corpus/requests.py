"""Requests: what the tokenising tasks hand to the teacher, as Arrow.

One request is one window to be labelled, or one sample to be generated and then labelled. Its key
says whether its label is already there; its place says which row of the corpus it came from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from labeler.corpus.windows import Int32Array
from schemas.keys import generated_row_key, place_key, row_key, stack_keys, unit_key
from schemas.label_set.label_set import QuarantineRow
from schemas.spec import GenerationSpec

NOT_GENERATED = -1
"""The sample index of rows that are not generated."""

_FIELDS = (
    ("row_key", pa.binary(16)),
    ("token_ids", pa.list_(pa.field("element", pa.int32(), nullable=False))),
    ("label_spans", pa.list_(pa.field("element", pa.int32(), nullable=False))),
    ("source", pa.string()),
    ("place", pa.int64()),
    ("window", pa.int32()),
    ("sample", pa.int32()),
)
REQUEST_SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for name, kind in _FIELDS])


@dataclass(frozen=True, eq=False)
class Request:
    """One sequence to be labelled, or one prompt to be continued and then labelled.

    Attributes:
        row_key: 16 bytes.
        token_ids: int32 [L]; of the prompt alone while its response is not there.
        label_spans: int32, flat [start, end) pairs of target indices; empty for a prompt.
        source, place, window: Where it comes from; see ``sources`` and ``windows``.
        sample: Which response to the prompt; -1 where nothing is generated.
    """

    row_key: bytes
    token_ids: Int32Array
    label_spans: Int32Array
    source: str
    place: int
    window: int = 0
    sample: int = NOT_GENERATED

    def with_response(self, response: Int32Array) -> "Request":
        """The request to label a response: prompt and response, of which the response is labelled.

        Args:
            response: int32 [at least 1], without the prompt.
        """
        start = len(self.token_ids)
        ids = np.concatenate([self.token_ids, np.asarray(response, np.int32)])
        return replace(self, token_ids=ids, label_spans=np.array([start, len(ids)], np.int32))

    def quarantined(self, reason: str, detail: str) -> QuarantineRow:
        """What is written where this request cannot be labelled."""
        return QuarantineRow(self.row_key, self.source, self.place, self.window, reason, detail)

    def seed(self) -> int:
        """The seed of this sample: the same in every run, in [0, 2**31)."""
        return int.from_bytes(self.row_key[:4], "little") >> 1


def label_request(
    token_ids: Int32Array, spans: Int32Array, source: str, place: int, window: int
) -> Request:
    """A request to label a sequence, under the key of its content."""
    return Request(row_key(token_ids, spans), token_ids, spans, source, place, window)


def sample_requests(
    prompt_ids: Int32Array, generation: GenerationSpec, source: str, place: int
) -> list[Request]:
    """The requests for all samples of a prompt, each under the key of how it is generated."""
    none = np.empty(0, np.int32)
    return [
        Request(
            generated_row_key(prompt_ids, generation, sample),
            prompt_ids,
            none,
            source,
            place,
            0,
            sample,
        )
        for sample in range(generation.n)
    ]


def to_table(requests: Sequence[Request]) -> pa.Table:
    """Requests as Arrow, in order."""
    columns: list[Any] = [
        pa.array([request.row_key for request in requests], pa.binary(16)),
        _lists([request.token_ids for request in requests]),
        _lists([request.label_spans for request in requests]),
        *(
            pa.array([getattr(request, name) for request in requests], kind)
            for name, kind in _FIELDS[3:]
        ),
    ]
    return pa.Table.from_arrays(columns, schema=REQUEST_SCHEMA)


def from_table(table: pa.Table) -> list[Request]:
    """The requests of a table, chunked or not; their arrays share its memory where they can."""
    columns: list[Any] = []
    for name, kind in _FIELDS:
        column = table.column(name)
        if pa.types.is_list(kind):
            chunks = column.chunks
            columns.append([row for chunk in chunks for row in _list_rows(chunk)])
        else:
            columns.append(column.to_pylist())
    return [Request(*values) for values in zip(*columns, strict=True)]


def requests_unit_key(requests: Sequence[Request], salt: str = "") -> str:
    """The key of the unit that these requests make, whatever becomes of each of them.

    Args:
        requests: One or more.
        salt: Not empty where the same rows have to make another unit than before: rows of a unit
            that are tried again would otherwise find that unit committed, with them in quarantine.
    """
    keys = [request.row_key for request in requests]
    return unit_key(stack_keys([*keys, place_key(salt, 0, 0)] if salt else keys))


def _flat(arrays: Sequence[Int32Array]) -> tuple[Int32Array, np.ndarray]:
    """int32 values of all arrays, and int64 offsets [R + 1] into them."""
    offsets = np.zeros(len(arrays) + 1, np.int64)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    values = np.concatenate(arrays) if arrays else np.empty(0, np.int32)
    return values.astype(np.int32, copy=False), offsets


def _lists(arrays: Sequence[Int32Array]) -> pa.Array:
    values, offsets = _flat(arrays)
    kind = pa.list_(pa.field("element", pa.int32(), nullable=False))
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.array(values, pa.int32()), type=kind
    )


def _list_rows(chunk: pa.ListArray) -> list[Int32Array]:
    values, offsets = chunk.values.to_numpy(), chunk.offsets.to_numpy()
    return [values[offsets[i] : offsets[i + 1]] for i in range(len(chunk))]
