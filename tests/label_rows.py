"""Rows of labels as a teacher would give them, from random logits, for tests that need some."""

import numpy as np

from schemas.keys import content_key, row_key, stack_keys
from schemas.record import LabelRows, round_logprobs
from schemas.rows import offsets_of, target_positions
from schemas.spec import LabelSetSpec, RecordSpec, TeacherIdentity, TextSpec


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
    """The labels that a teacher with these logits, [N, V] in row order, gives to the targets."""
    n, vocab_size = logits.shape
    k = min(spec.k, vocab_size)
    peak = logits.max(axis=1, keepdims=True)
    logprobs = logits - peak - np.log(np.exp(logits - peak).sum(axis=1, keepdims=True))
    order = np.argsort(-logprobs, axis=1, kind="stable")
    ordered = np.take_along_axis(logprobs, order, axis=1)
    target = logprobs[np.arange(n), targets]
    with np.errstate(divide="ignore"):
        tail = np.log(np.exp(ordered[:, k:]).sum(axis=1))
    lse = [np.log(np.exp(logprobs / t).sum(axis=1)) for t in spec.temperatures]

    def stored(x: np.ndarray) -> np.ndarray:
        return round_logprobs(x.astype(np.float32), spec.logprob_bits)

    kept = {name: getattr(rows, name) for name in rows.__dataclass_fields__}
    return LabelRows(
        **kept
        | {
            "head_len": np.full(n, k, np.uint16),
            "tail_len": np.zeros(n, np.uint16),
            "entry_ids": np.ascontiguousarray(order[:, :k], np.int32).reshape(-1),
            "entry_logprobs": stored(ordered[:, :k]).reshape(-1),
            "tail_logmass": stored(np.minimum(tail, 0.0)),
            "target_logprob": stored(target),
            "target_rank": 1 + (logprobs > target[:, None]).sum(axis=1).astype(np.int32),
            "entropy": stored(-(np.exp(logprobs) * logprobs).sum(axis=1)) if spec.entropy else None,
            "lse": stored(np.stack(lse, axis=1)) if lse else None,
        }
    )


def _spans(rng: np.random.Generator, length: int) -> np.ndarray:
    if length < 5 or rng.random() < 0.5:
        return np.array([1, length], np.int32)
    middle = int(rng.integers(2, length - 2))
    return np.array([1, middle, middle + 1, length], np.int32)


def _contexts(rng: np.random.Generator, num_rows: int, vocab_size: int) -> dict[str, np.ndarray]:
    lengths = rng.integers(0, 4, num_rows)
    ids = rng.integers(0, vocab_size, int(lengths.sum())).astype(np.int32)
    return {"teacher_context": ids, "context_offsets": offsets_of(lengths)}
