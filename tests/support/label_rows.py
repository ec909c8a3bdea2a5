"""Labelled rows from random logits, as a teacher would return them."""

from itertools import pairwise

import numpy as np

from schemas.keys import content_key, row_key, stack_keys
from schemas.record import LabelRows, round_logprobs
from schemas.record.spans import offsets_of, target_positions
from schemas.record.uniforms import uniforms
from schemas.spec import LabelSetSpec, RecordSpec, TeacherIdentity, TextSpec
from tests.support.label_oracle import Entries, entries_of


def make_spec(record: RecordSpec, vocab_size: int, weights_digest: str = "weights") -> LabelSetSpec:
    return LabelSetSpec(
        record=record,
        teacher=TeacherIdentity(
            weights_digest=weights_digest, tokenizer_digest="tokenizer", vocab_size=vocab_size
        ),
        text=TextSpec(max_tokens=512, overlap=64, add_bos=True, add_eos=True, split_long=True),
    )


def make_rows(
    num_rows: int,
    spec: RecordSpec,
    vocab_size: int,
    seed: int = 0,
    min_tokens: int = 2,
    max_tokens: int = 24,
    scale: float = 4.0,
) -> LabelRows:
    """`num_rows` valid rows; every token but the first is a target, in one span or in two."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(min_tokens, max_tokens + 1, num_rows)
    tokens = [rng.integers(0, vocab_size, n).astype(np.int32) for n in lengths]
    spans = [_spans(rng, int(n)) for n in lengths]
    rows = LabelRows(
        row_key=stack_keys([row_key(t, s) for t, s in zip(tokens, spans, strict=True)]),
        content_key=stack_keys([content_key(t, s) for t, s in zip(tokens, spans, strict=True)]),
        token_ids=np.concatenate([np.empty(0, np.int32), *tokens]),
        token_offsets=offsets_of(lengths),
        label_spans=np.concatenate([np.empty(0, np.int32), *spans]),
        span_offsets=offsets_of(np.array([len(s) for s in spans], np.int64)),
        **({} if not spec.teacher_context else _contexts(rng, num_rows, vocab_size)),
    )
    if spec.kind == "tokens":
        return rows
    indices, label_offsets = target_positions(rows.label_spans, rows.span_offsets)
    targets = rows.token_ids[indices + np.repeat(rows.token_offsets[:-1], np.diff(label_offsets))]
    return add_labels(rows, spec, rng.normal(0.0, scale, (len(targets), vocab_size)), targets)


def add_labels(
    rows: LabelRows, spec: RecordSpec, logits: np.ndarray, targets: np.ndarray
) -> LabelRows:
    """Labels of the targets by a teacher with these logits, [N, V] in row order."""
    n = len(logits)
    peak = logits.max(axis=1, keepdims=True)
    logprobs = logits - peak - np.log(np.exp(logits - peak).sum(axis=1, keepdims=True))
    order = np.argsort(-logprobs, axis=1, kind="stable")
    entries = _entries(rows, spec, logprobs, order)
    head_len, tail_len, ids, counts = entries
    label = np.repeat(np.arange(n), head_len + tail_len)
    in_head = np.arange(len(ids)) - offsets_of(head_len + tail_len)[label] < head_len[label]
    outside = np.ones_like(logprobs, np.bool_)
    outside[label[in_head], ids[in_head]] = False
    target = logprobs[np.arange(n), targets]
    with np.errstate(divide="ignore"):
        tail = np.log(np.where(outside, np.exp(logprobs), 0.0).sum(axis=1))
    if spec.kind == "sampled":
        tail[:] = 0.0
    lse = [np.log(np.exp(logprobs / t).sum(axis=1)) for t in spec.temperatures]

    def stored(x: np.ndarray) -> np.ndarray:
        return round_logprobs(x.astype(np.float32), spec.logprob_bits)

    kept = {name: getattr(rows, name) for name in rows.__dataclass_fields__}
    return LabelRows(
        **kept
        | {
            "head_len": head_len.astype(np.uint16),
            "tail_len": tail_len.astype(np.uint16),
            "entry_ids": ids.astype(np.int32),
            "entry_logprobs": stored(logprobs[label, ids]),
            "entry_counts": counts.astype(np.uint8) if spec.kind == "sampled" else None,
            "tail_logmass": stored(np.minimum(tail, 0.0)),
            "target_logprob": stored(target),
            "target_rank": 1 + (logprobs > target[:, None]).sum(axis=1).astype(np.int32),
            "entropy": stored(-(np.exp(logprobs) * logprobs).sum(axis=1)) if spec.entropy else None,
            "lse": stored(np.stack(lse, axis=1)) if lse else None,
        }
    )


def _entries(
    rows: LabelRows, spec: RecordSpec, logprobs: np.ndarray, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lengths of heads and tails [N], and ids and counts of all entries."""
    n, vocab_size = logprobs.shape
    if spec.kind == "topk":
        k = min(spec.k, vocab_size)
        ids = np.ascontiguousarray(order[:, :k]).reshape(-1)
        return np.full(n, k), np.zeros(n, np.int64), ids, ids
    numbers = _uniforms(rows, spec)
    kept = [
        entries_of(logprobs[at], spec, None if numbers is None else numbers[at]) for at in range(n)
    ]
    none = Entries(*[np.empty(0, np.int64)] * 3)
    return (
        np.array([len(one.head) for one in kept], np.int64),
        np.array([len(one.draws) for one in kept], np.int64),
        np.concatenate([one.ids for one in [none, *kept]]),
        np.concatenate([one.counts for one in [none, *kept]]),
    )


def _uniforms(rows: LabelRows, spec: RecordSpec) -> np.ndarray | None:
    """float64 [N, numbers of a position]; None for kinds without draws."""
    if not spec.has_draws:
        return None
    count = spec.draws if spec.kind == "sampled" else 1
    positions, offsets = target_positions(rows.label_spans, rows.span_offsets)
    parts = [
        uniforms(rows.row_key[i].tobytes(), positions[a:b], count, spec.draw_seed)
        for i, (a, b) in enumerate(pairwise(offsets))
    ]
    return np.concatenate([np.empty((0, count)), *parts])


def _spans(rng: np.random.Generator, length: int) -> np.ndarray:
    if length < 5 or rng.random() < 0.5:
        return np.array([1, length], np.int32)
    middle = int(rng.integers(2, length - 2))
    return np.array([1, middle, middle + 1, length], np.int32)


def _contexts(rng: np.random.Generator, num_rows: int, vocab_size: int) -> dict[str, np.ndarray]:
    lengths = rng.integers(0, 4, num_rows)
    ids = rng.integers(0, vocab_size, int(lengths.sum())).astype(np.int32)
    return {"teacher_context": ids, "context_offsets": offsets_of(lengths)}
