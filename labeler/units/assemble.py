"""Labels of single rows -> one batch of rows in the stored form, rounded as the record says."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from labeler.teachers.protocol import RowLabels
from schemas.record import LabelRows, round_logprobs
from schemas.record.rounding import FLOAT16_BITS
from schemas.spec import RecordSpec


def assemble_rows(
    row_keys: npt.NDArray[np.uint8],
    content_keys: npt.NDArray[np.uint8],
    token_ids: Sequence[np.ndarray],
    label_spans: Sequence[np.ndarray],
    labels: Sequence[RowLabels] | None,
    record: RecordSpec,
) -> LabelRows:
    """Puts R rows and their labels together.

    The order of a head is kept as the teacher gave it, by falling probability before rounding;
    rounding never reverses two entries, but may make them equal. An id that the model forbids is
    stored with the lowest log-probability there is, whose probability is zero.

    Args:
        row_keys: uint8 [R, 16].
        content_keys: uint8 [R, 16].
        token_ids: one integer array [L] a row.
        label_spans: one flat array of [start, end) pairs a row.
        labels: one a row, or None for a record of kind ``tokens``.
        record: how many bits to keep, and which columns there are.

    Returns:
        The rows.
    """
    tokens = [np.asarray(row, dtype=np.int32) for row in token_ids]
    spans = [np.asarray(row, dtype=np.int32) for row in label_spans]
    return LabelRows(
        row_key=row_keys,
        content_key=content_keys,
        token_ids=_concatenated(tokens),
        token_offsets=_offsets(tokens),
        label_spans=_concatenated(spans),
        span_offsets=_offsets(spans),
        **({} if labels is None else _label_columns(labels, record)),
    )


def _label_columns(labels: Sequence[RowLabels], record: RecordSpec) -> dict[str, Any]:
    def column(read: Callable[[RowLabels], np.ndarray | None]) -> np.ndarray:
        return np.concatenate([_present(read(row)) for row in labels])

    def rounded(read: Callable[[RowLabels], np.ndarray | None]) -> npt.NDArray[np.float16]:
        return round_logprobs(column(read), record.logprob_bits)

    used = [_used_slots(row) for row in labels]
    ends = np.cumsum([0, *(count for count, _ in used)])

    def entries(
        read: Callable[[RowLabels], np.ndarray | None],
        dtype: type[np.generic],
        store: Callable[[np.ndarray, np.ndarray], object] = _copy,
    ) -> np.ndarray:
        # Row by row into its place: anything in between would be memory of the size of a unit.
        flat = np.empty(ends[-1], dtype)
        for row, (_, slots), first, end in zip(labels, used, ends, ends[1:], strict=False):
            values, place = _present(read(row)), flat[first:end]
            if slots is None:
                store(values, place.reshape(values.shape))
            else:
                store(np.ascontiguousarray(values).reshape(-1).take(slots), place)
        return flat

    columns: dict[str, Any] = {
        "head_len": column(lambda row: row.head_len).astype(np.uint16),
        "tail_len": column(lambda row: row.tail_len).astype(np.uint16),
        "entry_ids": entries(lambda row: row.entry_ids, np.int32),
        "entry_logprobs": entries(
            lambda row: row.entry_logprobs,
            np.float16,
            lambda values, place: round_logprobs(values, record.logprob_bits, place),
        ),
        "tail_logmass": rounded(lambda row: row.tail_logmass),
        "target_logprob": rounded(lambda row: row.target_logprob),
        "target_rank": column(lambda row: row.target_rank),
    }
    if record.kind == "sampled":  # heads are empty, so that every entry is a draw
        columns["entry_counts"] = entries(lambda row: row.entry_counts, np.uint8)
    if record.entropy:
        columns["entropy"] = rounded(lambda row: row.entropy)
    if record.temperatures:
        # Weights at a temperature are multiplied with exp(-lse): its rounding has no other to
        # cancel with, so it keeps all its bits.
        columns["lse"] = round_logprobs(column(lambda row: row.lse), FLOAT16_BITS)
    return columns


def _used_slots(labels: RowLabels) -> tuple[int, npt.NDArray[np.int64] | None]:
    """How many entries [N, K] arrays of entries have, and where; None where all slots are used."""
    lengths = np.asarray(labels.head_len) + labels.tail_len
    width = labels.entry_ids.shape[1]
    if (lengths == width).all():  # selecting would copy what is already right
        return labels.entry_ids.size, None
    slots = np.flatnonzero(np.arange(width) < lengths[:, None])
    return len(slots), slots


def _copy(values: np.ndarray, place: np.ndarray) -> None:
    np.copyto(place, values, casting="unsafe")  # counts are wider on their way home


def _present(values: np.ndarray | None) -> np.ndarray:
    assert values is not None, "the teacher left out a column of its record"
    return values


def _concatenated(rows: list[np.ndarray]) -> npt.NDArray[np.int32]:
    return np.concatenate(rows) if rows else np.zeros(0, dtype=np.int32)


def _offsets(rows: list[np.ndarray]) -> npt.NDArray[np.int64]:
    return np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
