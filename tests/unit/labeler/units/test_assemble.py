"""Labels of single rows put together: what is stored, and that it satisfies the record."""

import dataclasses

import numpy as np
import pytest
import torch

from labeler.label_head.position_labels import label_logits
from labeler.teachers.protocol import RowLabels
from labeler.units.assemble import assemble_rows
from schemas.record import LOWEST_LOGPROB, LabelRows, validate
from schemas.record.spans import span_targets
from schemas.spec import RecordSpec

VOCAB_SIZE = 500
SPANS = [[1, 7], [2, 3, 5, 9], [1, 2]]
LENGTHS = [7, 12, 2]


def make_rows(
    record: RecordSpec, scale: float = 3.0, forbidden: int = 0
) -> tuple[LabelRows, list[RowLabels]]:
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, VOCAB_SIZE - forbidden, n, dtype=np.int32) for n in LENGTHS]
    spans = [np.array(flat, dtype=np.int32) for flat in SPANS]
    labels = []
    for row, flat in zip(tokens, spans, strict=True):
        targets = torch.from_numpy(row[span_targets(flat)])
        logits = torch.from_numpy(rng.normal(size=(len(targets), VOCAB_SIZE))).float() * scale
        logits[:, VOCAB_SIZE - forbidden :] = -torch.inf
        per_position = record.draws if record.kind == "sampled" else 1
        uniforms = rng.random((len(targets), per_position)) if record.has_draws else None
        columns = label_logits(logits, targets, record, uniforms)
        labels.append(RowLabels(*(None if c is None else c.numpy() for c in columns.columns())))
    keys = rng.integers(0, 256, (2, len(tokens), 16), dtype=np.uint8)
    return assemble_rows(keys[0], keys[1], tokens, spans, labels, record), labels


@pytest.mark.parametrize("kind", ["topk", "topp", "threshold", "sampled"])
@pytest.mark.parametrize("bits", [10, 6, 3])
@pytest.mark.parametrize("scale", [0.01, 3.0, 40.0])
def test_rows_satisfy_the_record(kind: str, bits: int, scale: float) -> None:
    record = RecordSpec(kind=kind, temperatures=(0.5, 2.0), logprob_bits=bits)
    rows, _ = make_rows(record, scale)
    validate(rows, record, VOCAB_SIZE)


@pytest.mark.parametrize("kind", ["topp", "threshold", "sampled"])
def test_entries_are_those_that_are_used(kind: str) -> None:
    record = RecordSpec(kind=kind, logprob_bits=10)
    rows, labels = make_rows(record, forbidden=30)
    validate(rows, record, VOCAB_SIZE)
    at = 0
    for row in labels:
        for j in range(row.num_labels):
            count = int(row.head_len[j] + row.tail_len[j])
            assert rows.entry_offsets is not None
            part = slice(rows.entry_offsets[at], rows.entry_offsets[at + 1])
            np.testing.assert_array_equal(rows.entry_ids[part], row.entry_ids[j, :count])
            np.testing.assert_allclose(
                rows.entry_logprobs[part], row.entry_logprobs[j, :count], rtol=2**-10
            )
            if row.entry_counts is not None:
                np.testing.assert_array_equal(rows.entry_counts[part], row.entry_counts[j, :count])
            at += 1
    assert at == rows.num_labels


def test_values_and_order() -> None:
    record = RecordSpec(kind="topk", k=8, temperatures=(2.0,), logprob_bits=10)
    rows, labels = make_rows(record)
    assert rows.num_labels == 12
    assert rows.label_offsets.tolist() == [0, 6, 11, 12]
    assert rows.entry_ids is not None
    assert rows.entry_logprobs is not None
    middle = slice(6 * 8, 11 * 8)
    np.testing.assert_array_equal(rows.entry_ids[middle], labels[1].entry_ids.reshape(-1))
    np.testing.assert_allclose(
        rows.entry_logprobs[middle], labels[1].entry_logprobs.reshape(-1), rtol=2**-10
    )
    for name in ("tail_logmass", "target_logprob", "target_rank", "entropy", "lse"):
        expected = np.concatenate([getattr(row, name) for row in labels])
        np.testing.assert_allclose(getattr(rows, name), expected, rtol=2**-10, err_msg=name)


def test_forbidden_ids_and_an_empty_tail_are_finite_zeros() -> None:
    record = RecordSpec(kind="topk", k=64, logprob_bits=10)
    rows, _ = make_rows(record, forbidden=470)
    validate(rows, record, VOCAB_SIZE)
    assert rows.entry_logprobs is not None
    assert rows.tail_logmass is not None
    assert (rows.entry_logprobs.reshape(-1, 64)[:, 30:] == LOWEST_LOGPROB).all()
    assert (rows.tail_logmass == LOWEST_LOGPROB).all()
    assert (np.exp(rows.tail_logmass.astype(np.float64)) == 0).all()


def test_vocabulary_smaller_than_k_is_stored_whole() -> None:
    record = RecordSpec(kind="topk", k=1000)
    rows, _ = make_rows(record)
    validate(rows, record, VOCAB_SIZE)
    assert rows.head_len is not None
    assert (rows.head_len == VOCAB_SIZE).all()


def test_tokens_without_a_teacher() -> None:
    record = RecordSpec(kind="tokens")
    tokens = [np.arange(n) for n in LENGTHS]
    keys = np.zeros((3, 16), dtype=np.uint8)
    rows = assemble_rows(keys, keys, tokens, [np.array(s) for s in SPANS], None, record)
    validate(rows, record, VOCAB_SIZE)
    assert rows.entry_ids is None
    assert rows.num_labels == 12


def test_no_rows() -> None:
    keys = np.zeros((0, 16), dtype=np.uint8)
    assert len(assemble_rows(keys, keys, [], [], None, RecordSpec(kind="tokens"))) == 0


def test_labels_that_mean_nothing_are_found() -> None:
    record = RecordSpec(kind="topk", k=4, temperatures=(2.0,))
    _, labels = make_rows(record, forbidden=450)
    row = labels[0]
    assert row.first_unusable() is None
    for name in ("entry_logprobs", "tail_logmass", "target_logprob", "entropy", "lse"):
        column = getattr(row, name).copy()
        column[3] = np.nan
        assert dataclasses.replace(row, **{name: column}).first_unusable() == 3, name
    impossible = row.target_logprob.copy()
    impossible[5] = -np.inf
    assert dataclasses.replace(row, target_logprob=impossible).first_unusable() == 5
