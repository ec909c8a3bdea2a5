"""Assembles the labels of single rows into one batch in stored form, rounded as the record says."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from labeler.teachers.protocol import RowLabels
from schemas.record import LabelRows, round_logprobs
from schemas.record.rounding import FLOAT16_BITS
from schemas.record.spans import offsets_of
from schemas.spec import RecordSpec


def assemble_rows(
    row_keys: npt.NDArray[np.uint8],
    content_keys: npt.NDArray[np.uint8],
    token_ids: Sequence[np.ndarray],
    label_spans: Sequence[np.ndarray],
    labels: Sequence[RowLabels] | None,
    record: RecordSpec,
) -> LabelRows:
    """Assembles R rows and their labels.

    Heads keep the teacher's order, descending probability before rounding: rounding never swaps two
    entries, but may make them equal. An id that the model forbids is stored with the lowest finite
    log-probability, whose probability is zero.

    Args:
        row_keys: uint8 [R, 16].
        content_keys: uint8 [R, 16].
        token_ids: one integer array [L] per row.
        label_spans: one flat array of [start, end) pairs per row.
        labels: one per row, or None for a record of kind ``tokens``.
        record: precision and columns.
    """
    tokens, token_offsets = _join(token_ids)
    spans, span_offsets = _join(label_spans)
    return LabelRows(
        row_key=row_keys,
        content_key=content_keys,
        token_ids=tokens,
        token_offsets=token_offsets,
        label_spans=spans,
        span_offsets=span_offsets,
        **({} if labels is None else _label_columns(labels, record)),
    )


def _join(rows: Sequence[np.ndarray]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Concatenates rows; returns the array and offsets [R + 1] into it."""
    arrays = [np.zeros(0, np.int32), *(np.asarray(row, dtype=np.int32) for row in rows)]
    return np.concatenate(arrays), offsets_of(np.array([len(row) for row in rows], np.int64))


def _label_columns(labels: Sequence[RowLabels], record: RecordSpec) -> dict[str, Any]:
    def column(name: str) -> np.ndarray:
        return np.concatenate([getattr(row, name) for row in labels])

    def rounded(name: str) -> npt.NDArray[np.float16]:
        return round_logprobs(column(name), record.logprob_bits)

    used = [_used_slots(row) for row in labels]
    ends = np.cumsum([0, *(count for count, _ in used)])

    def entries(
        name: str,
        dtype: type[np.generic],
        store: Callable[[np.ndarray, np.ndarray], object] = _copy,
    ) -> np.ndarray:
        # Row by row in place: an intermediate array would be as large as the unit.
        flat = np.empty(ends[-1], dtype)
        for row, (_, slots), first, end in zip(labels, used, ends, ends[1:], strict=False):
            values, place = getattr(row, name), flat[first:end]
            if slots is None:
                store(values, place.reshape(values.shape))
            else:
                store(np.ascontiguousarray(values).reshape(-1).take(slots), place)
        return flat

    columns: dict[str, Any] = {
        "head_len": column("head_len").astype(np.uint16),
        "tail_len": column("tail_len").astype(np.uint16),
        "entry_ids": entries("entry_ids", np.int32),
        "entry_logprobs": entries(
            "entry_logprobs",
            np.float16,
            lambda values, place: round_logprobs(values, record.logprob_bits, place),
        ),
        "tail_logmass": rounded("tail_logmass"),
        "target_logprob": rounded("target_logprob"),
        "target_rank": column("target_rank"),
    }
    if record.kind == "sampled":  # heads are empty: every entry is a draw
        columns["entry_counts"] = entries("entry_counts", np.uint8)
    if record.entropy:
        columns["entropy"] = rounded("entropy")
    if record.temperatures:
        # Weights at a temperature are multiplied by exp(-lse), whose rounding error does not
        # cancel, so lse keeps all of its bits.
        columns["lse"] = round_logprobs(column("lse"), FLOAT16_BITS)
    return columns


def _used_slots(labels: RowLabels) -> tuple[int, npt.NDArray[np.int64] | None]:
    """Number of entries in the arrays [N, K], and their flat slots; None if all slots are used."""
    lengths = np.asarray(labels.head_len) + labels.tail_len
    width = labels.entry_ids.shape[1]
    if (lengths == width).all():  # avoids copying the arrays
        return labels.entry_ids.size, None
    slots = np.flatnonzero(np.arange(width) < lengths[:, None])
    return len(slots), slots


def _copy(values: np.ndarray, place: np.ndarray) -> None:
    np.copyto(place, values, casting="unsafe")  # teachers return wider integers
