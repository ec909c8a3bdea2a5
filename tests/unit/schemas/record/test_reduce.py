"""Rows of a smaller record from those of a larger one."""

import functools
import re

import numpy as np
import pytest

from schemas.errors import RecordError
from schemas.keys import stack_keys
from schemas.record.reduce import record_conflicts, reduce_rows
from schemas.record.rows import LabelRows
from schemas.record.spans import offsets_of
from schemas.record.validate import validate
from schemas.spec import RecordSpec
from tests.support.label_rows import add_labels, make_rows

VOCAB_SIZE = 200
exact = functools.partial(RecordSpec, logprob_bits=10)
THRESHOLD = exact(kind="threshold", tau=0.02, temperatures=(0.5, 2.0), draw_temperature=1.0)
AT_TWO = exact(kind="threshold", tau=0.02, temperatures=(2.0,))


def thinned(record: RecordSpec, tau: float) -> RecordSpec:
    return record.model_copy(update={"tau": tau})


@pytest.mark.parametrize(
    ("have", "want"),
    [
        (
            exact(kind="topk", k=40),
            exact(kind="topk", k=7),
        ),
        (
            exact(kind="topk", k=40, temperatures=(0.5, 2.0)),
            exact(kind="topk", k=40, temperatures=(2.0,)),
        ),
        (
            exact(kind="topk", k=40, temperatures=(0.5,)),
            exact(kind="topk", k=40, entropy=False),
        ),
        (
            exact(kind="topk", k=40),
            RecordSpec(kind="topk", k=40, logprob_bits=7),
        ),
        (
            exact(kind="topk", k=40),
            exact(kind="topp", top_p=0.8, max_head=40),
        ),
        (
            exact(kind="topk", k=40),
            exact(kind="topp", top_p=0.999, max_head=9),
        ),
        (exact(kind="topp"), exact(kind="topp", top_p=0.5, max_head=20)),
        (THRESHOLD, thinned(THRESHOLD, 0.06)),
        (THRESHOLD, thinned(THRESHOLD, 0.9)),
        (AT_TWO, thinned(AT_TWO, 0.05)),
        (
            exact(kind="sampled", temperatures=(2.0,)),
            RecordSpec(kind="sampled", temperatures=(2.0,), logprob_bits=5, entropy=False),
        ),
    ],
)
def test_reduced_rows_are_valid_rows_of_the_smaller_record(have, want):
    rows = make_rows(30, have, VOCAB_SIZE, seed=1)
    validate(rows, have, VOCAB_SIZE)
    assert record_conflicts(have, want) == []
    reduced = reduce_rows(rows, have, want)
    validate(reduced, want, VOCAB_SIZE)
    assert LabelRows.from_table(reduced.to_table(want), want).num_labels == rows.num_labels
    again = reduce_rows(rows, have, want)
    np.testing.assert_array_equal(reduced.entry_ids, again.entry_ids)


@pytest.mark.parametrize(
    ("have", "want"),
    [
        (
            exact(kind="topk", k=40),
            exact(kind="topk", k=7),
        ),
        (
            exact(kind="topk", k=40),
            exact(kind="topp", top_p=0.8, max_head=40),
        ),
        (exact(kind="topp"), exact(kind="topp", top_p=0.5)),
        (THRESHOLD, thinned(THRESHOLD, 0.05)),
    ],
)
def test_heads_are_those_that_the_teacher_would_have_given(have, want):
    """But for draws, which are others, reduced labels are the labels of the smaller record."""
    rows, direct = (make_rows(30, spec, VOCAB_SIZE, seed=2) for spec in (have, want))
    reduced = reduce_rows(rows, have, want)
    np.testing.assert_array_equal(reduced.head_len, direct.head_len)
    np.testing.assert_array_equal(heads(reduced), heads(direct))
    found, expected = (np.exp(r.tail_logmass.astype(np.float64)) for r in (reduced, direct))
    np.testing.assert_allclose(found, expected, atol=2e-3)
    np.testing.assert_array_equal(reduced.target_logprob, direct.target_logprob)


def heads(rows: LabelRows) -> np.ndarray:
    at = np.repeat(np.arange(rows.num_labels), np.diff(rows.entry_offsets))
    return rows.entry_ids[np.arange(len(at)) - rows.entry_offsets[at] < rows.head_len[at]]


@pytest.mark.parametrize("have", [THRESHOLD, AT_TWO])
@pytest.mark.parametrize("tau", [0.03, 0.05, 0.13, 0.5])
def test_thinned_labels_stay_unbiased(have, tau):
    """The weights of many labels of one distribution, each thinned, have its mean and no other."""
    num_rows, vocab_size, seed = 20_000, 60, 3
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    logits = np.log(1.0 / np.arange(1, vocab_size + 1) ** 1.1)[rng.permutation(vocab_size)]
    rows = one_position_each(num_rows, rng)
    targets = np.zeros(num_rows, np.int64)
    rows = add_labels(rows, have, np.tile(logits, (num_rows, 1)), targets)
    want = thinned(have, tau)
    reduced = reduce_rows(rows, have, want)
    validate(reduced, want, vocab_size)

    at = np.repeat(np.arange(num_rows), np.diff(reduced.entry_offsets))
    in_head = np.arange(len(at)) - reduced.entry_offsets[at] < reduced.head_len[at]
    p_s = np.exp(logits / have.drawn_at)
    p_s /= p_s.sum()
    weights = np.where(in_head, p_s[reduced.entry_ids], tau)
    mean = np.bincount(reduced.entry_ids, weights, vocab_size) / num_rows
    # Each id is there or not, with tau as its weight: a binomial share of labels.
    error = np.sqrt(np.maximum(p_s * (tau - p_s), 0) / num_rows)
    assert (np.abs(mean - p_s) <= 4.5 * error + 2e-3 * p_s).all()
    assert np.abs(weights.sum() / num_rows - 1.0) < 5e-3


def one_position_each(num_rows: int, rng: np.random.Generator) -> LabelRows:
    keys = stack_keys([rng.bytes(16) for _ in range(num_rows)])
    return LabelRows(
        row_key=keys,
        content_key=keys,
        token_ids=np.zeros(2 * num_rows, np.int32),
        token_offsets=offsets_of(np.full(num_rows, 2)),
        label_spans=np.tile(np.array([1, 2], np.int32), num_rows),
        span_offsets=offsets_of(np.full(num_rows, 2)),
    )


@pytest.mark.parametrize(
    ("have", "want", "reason"),
    [
        (
            exact(kind="topk", k=8),
            exact(kind="topk", k=9),
            "record.k: only 8",
        ),
        (
            exact(kind="topk", k=8),
            exact(kind="topp", max_head=9),
            "record.max_head: only 8",
        ),
        (
            exact(kind="topp"),
            exact(kind="topk", k=2),
            '"topp" cannot be reduced to "topk"',
        ),
        (exact(kind="topp"), exact(kind="topp", top_p=0.99), "record.top_p: only 0.98"),
        (RecordSpec(entropy=False), RecordSpec(), "record.entropy"),
        (RecordSpec(logprob_bits=8), RecordSpec(logprob_bits=9), "record.logprob_bits: only 8"),
        (RecordSpec(), RecordSpec(temperatures=(2.0,)), r"\[2.0\] are not stored"),
        (THRESHOLD, thinned(THRESHOLD, 0.01), "record.tau: 0.02"),
        (AT_TWO, THRESHOLD, "record.draw_temperature"),
        (AT_TWO, AT_TWO.model_copy(update={"draw_seed": 1}), "record.draw_seed"),
        (exact(kind="sampled", draws=32), exact(kind="sampled", draws=8), "record.draws"),
        (
            exact(kind="topk", k=64),
            exact(kind="threshold"),
            '"topk" cannot be reduced to "threshold"',
        ),
        (RecordSpec(teacher_context=True), RecordSpec(), "record.teacher_context"),
        (RecordSpec(kind="tokens"), RecordSpec(), '"tokens" cannot be reduced to "threshold"'),
    ],
)
def test_what_cannot_be_served_says_why(have, want, reason):
    assert any(re.search(reason, found) for found in record_conflicts(have, want))
    with pytest.raises(RecordError, match=reason):
        reduce_rows(make_rows(1, have, VOCAB_SIZE), have, want)


def test_reduce_to_the_same_record_keeps_rows_and_the_columns_read():
    rows = make_rows(3, THRESHOLD, VOCAB_SIZE)
    assert reduce_rows(rows, THRESHOLD, THRESHOLD) is rows
    fewer = THRESHOLD.model_copy(update={"temperatures": (2.0,), "entropy": False})
    assert reduce_rows(rows, THRESHOLD, fewer).entry_ids is rows.entry_ids
    table = rows.to_table(THRESHOLD).drop_columns(["entropy", "target_logprob", "target_rank"])
    reduced = reduce_rows(
        LabelRows.from_table(table, THRESHOLD), THRESHOLD, thinned(THRESHOLD, 0.1)
    )
    assert reduced.target_rank is None
    assert reduced.entry_ids is not None
    table = make_rows(3, AT_TWO, VOCAB_SIZE).to_table(AT_TWO).drop_columns(["lse"])
    without = LabelRows.from_table(table, AT_TWO)
    with pytest.raises(RecordError, match="lse was not read"):
        reduce_rows(without, AT_TWO, thinned(AT_TWO, 0.1))


def test_no_rows_reduce_to_no_rows():
    rows = make_rows(2, THRESHOLD, VOCAB_SIZE).slice(0, 0)
    assert len(reduce_rows(rows, THRESHOLD, thinned(THRESHOLD, 0.1))) == 0
