"""Converts labels to the Parquet layouts of two other trainers.

Both layouts have one teacher distribution per input token, aligned with the student's output: **row
j is the distribution over token j + 1**. Label sets index labels by their target token t, so label
t becomes row t - 1.

axolotl (KD plugin, tokenised data; one row per token, of which the last is padding)::

    input_ids         list<int32> [L]
    attention_mask    list<int8> [L]          all 1
    labels            list<int32> [L]         the token where it is a target, else -100
    target_token_ids  list<list<int32>> [L, K]
    target_logprobs   list<list<float32>> [L, K]   nats, temperature 1, not renormalised
    target_mask       list<list<int8>> [L, K] 0 in rows and slots without a teacher

DistillKit (offline teacher, ``logprob_compressor`` with every value exact; one row per token; the
last token is dropped, because it is only the target of the last row)::

    input_ids            list<uint64> [L - 1]
    compressed_logprobs  list<list<uint8>> [L - 1, 2 K]    little-endian float16
    bytepacked_indices   list<list<uint8>> [L - 1, ceil(K b / 8)]   b = ceil(log2 V), high bit first
    labels               list<int64> [L - 1]  the token where row j has a teacher, else -100; only
                         if some row is partly labelled

Neither layout can represent weighted tail draws or the tail mass.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.errors import RecordError
from schemas.record.rows import LabelRows
from schemas.record.spans import offsets_of, target_positions
from schemas.spec import LabelSetSpec

PADDING_LOGPROB = -1e9
IGNORED = -100  # torch's cross-entropy skips this index


def check_exportable(spec: LabelSetSpec, layout: str) -> None:
    """Checks that a layout represents the labels of a set exactly.

    Raises:
        RecordError: it does not; the message says why and which kinds it can represent.
    """
    record = spec.record
    kinds = {"axolotl": ("topk", "topp"), "distillkit": ("topk",)}[layout]
    if record.kind not in kinds:
        why = {
            "tokens": "it has no teacher labels",
            "topp": "its heads differ in length, but the layout has a single K; padding them "
            "would change the student's share of missing mass",
        }.get(record.kind, "its draws carry weights, which a top-k layout cannot represent")
        raise RecordError(
            f'a label set of kind "{record.kind}" cannot be written as {layout}: {why}; expected '
            f"kind {' or '.join(kinds)}"
        )
    if record.teacher_context:
        raise RecordError(
            f"this label set has tokens that only the teacher saw; {layout} cannot represent them"
        )


def axolotl_table(rows: LabelRows) -> pa.Table:
    """Converts rows to axolotl's layout."""
    assert rows.entry_offsets is not None
    assert rows.entry_logprobs is not None
    row, target = _targets(rows)
    teacher_row = rows.token_offsets[row] + target - 1  # index into all tokens of the batch
    num_tokens = rows.num_tokens
    entries = np.diff(rows.entry_offsets)
    # Padding rows are as wide as the narrowest label, so that K is constant for topk.
    width = np.full(num_tokens, entries.min() if len(entries) else 1, np.int64)
    width[teacher_row] = entries
    slots = offsets_of(width)
    ids = np.zeros(slots[-1], np.int32)
    logprobs = np.full(slots[-1], PADDING_LOGPROB, np.float32)
    mask = np.zeros(slots[-1], np.int8)
    into = np.repeat(slots[teacher_row] - rows.entry_offsets[:-1], entries)
    into += np.arange(len(into))
    ids[into] = rows.entry_ids
    logprobs[into] = rows.entry_logprobs
    mask[into] = 1
    labels = np.full(num_tokens, IGNORED, np.int32)
    labels[teacher_row + 1] = rows.token_ids[teacher_row + 1]
    outer = rows.token_offsets
    return pa.table(
        {
            "row_key": pa.array([key.tobytes().hex() for key in rows.row_key], pa.string()),
            "input_ids": _lists(outer, pa.array(rows.token_ids)),
            "attention_mask": _lists(outer, pa.array(np.ones(num_tokens, np.int8))),
            "labels": _lists(outer, pa.array(labels)),
            "target_token_ids": _lists(outer, _lists(slots, pa.array(ids))),
            "target_logprobs": _lists(outer, _lists(slots, pa.array(logprobs))),
            "target_mask": _lists(outer, _lists(slots, pa.array(mask))),
        }
    )


def distillkit_table(rows: LabelRows, vocab_size: int) -> pa.Table:
    """Converts rows to DistillKit's layout; drops rows of one token, which predict nothing.

    Args:
        rows: rows of kind ``topk``.
        vocab_size: V, which determines the width of packed ids.
    """
    assert rows.head_len is not None
    assert rows.entry_ids is not None
    assert rows.entry_logprobs is not None
    row, target = _targets(rows)
    kept = np.diff(rows.token_offsets) - 1
    outer = offsets_of(kept)
    teacher_row = outer[row] + target - 1
    k = int(rows.head_len.max(initial=1))
    # Rows without a teacher are masked by `labels`, but still need a valid distribution.
    ids = np.tile(np.arange(k, dtype=np.int64), (int(outer[-1]), 1))
    logprobs = np.full((int(outer[-1]), k), np.log(1.0 / k), np.float16)
    ids[teacher_row] = rows.entry_ids.reshape(-1, k)
    logprobs[teacher_row] = rows.entry_logprobs.reshape(-1, k)
    last = np.zeros(rows.num_tokens, bool)
    last[rows.token_offsets[1:] - 1] = True
    tokens = rows.token_ids[~last]
    labels = np.full(len(tokens), IGNORED, np.int64)
    labels[teacher_row] = tokens[teacher_row]
    table = pa.table(
        {
            "input_ids": _lists(outer, pa.array(tokens.astype(np.uint64))),
            "compressed_logprobs": _lists(
                outer, _byte_lists(logprobs.astype("<f2").view(np.uint8))
            ),
            "bytepacked_indices": _lists(outer, _byte_lists(pack_ids(ids, index_bits(vocab_size)))),
            "labels": _lists(outer, pa.array(labels)),
        }
    )
    return table.filter(pa.array(kept > 0))


def index_bits(vocab_size: int) -> int:
    """Width of a packed id in bits: the smallest b >= 1 with 2^b >= V."""
    return max(1, int(vocab_size - 1).bit_length())


def pack_ids(ids: npt.NDArray[np.int64], bits: int) -> npt.NDArray[np.uint8]:
    """Packs ids [N, K] into bytes [N, ceil(K * bits / 8)], high bit first, each row zero-padded."""
    spread = (ids[:, :, None] >> np.arange(bits - 1, -1, -1)) & 1
    flat = spread.astype(np.uint8).reshape(len(ids), ids.shape[1] * bits)
    return np.packbits(flat, axis=1)


def is_fully_labelled(rows: LabelRows) -> bool:
    """Whether every token except the first of each row is a target."""
    return bool((np.diff(rows.label_offsets) == np.diff(rows.token_offsets) - 1).all())


def _targets(rows: LabelRows) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Row of each label, and the index of its target token in that row: int64 [labels]."""
    targets, offsets = target_positions(rows.label_spans, rows.span_offsets)
    row = np.repeat(np.arange(len(rows)), np.diff(offsets))
    return row, targets


def _lists(offsets: npt.NDArray[np.int64], values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)


def _byte_lists(values: npt.NDArray[np.uint8]) -> pa.ListArray:
    offsets = np.arange(len(values) + 1) * values.shape[1]
    return _lists(offsets, pa.array(np.ascontiguousarray(values).reshape(-1)))
