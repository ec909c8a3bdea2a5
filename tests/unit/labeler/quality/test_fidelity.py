"""Audits: what the stored labels have lost, and what a faulty label head would be caught by."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.rounding_kl import rounding_kl
from labeler.label_head.audit_logits import audit_logits
from labeler.label_head.position_labels import label_logits
from labeler.quality.fidelity import measure
from labeler.teachers.audits import Audit, audited_labels
from labeler.teachers.draw_uniforms import row_uniforms
from labeler.teachers.protocol import RowLabels
from labeler.units.assemble import assemble_rows
from schemas.label_set.manifest import Fidelity
from schemas.record import LabelRows
from schemas.spec import RecordSpec

VOCAB_SIZE = 400
LENGTHS = [40, 7, 90]
KINDS = {
    "topk": RecordSpec(kind="topk", k=16, temperatures=(2.0,), logprob_bits=10),
    "topp": RecordSpec(kind="topp", top_p=0.9, max_head=40, logprob_bits=10),
    "threshold": RecordSpec(kind="threshold", tau=0.05, logprob_bits=10),
    "sampled": RecordSpec(kind="sampled", draws=20, logprob_bits=10),
}


def make_labels(record: RecordSpec, rate: float, seed: int = 0) -> list[RowLabels]:
    """Labels of random logits with their audits."""
    rng = np.random.default_rng(seed)
    labels = []
    for row, length in enumerate(LENGTHS):
        logits = torch.from_numpy(rng.normal(size=(length - 1, VOCAB_SIZE))).float() * 3
        key = bytes([row] * 16)
        targets = np.arange(1, length)
        uniforms = row_uniforms(record, key, targets)
        columns = label_logits(logits, torch.from_numpy(targets), record, uniforms)
        audited = audited_labels(key, length - 1, rate)
        at = torch.from_numpy(audited)
        audit = audit_logits(logits[at], columns.entry_ids[at], columns.head_len[at])
        arrays = [None if column is None else column.numpy() for column in columns.columns()]
        labels.append(RowLabels(*arrays, audit=Audit.from_columns(audited, audit.numpy())))
    return labels


def assemble(labels: list[RowLabels], record: RecordSpec) -> LabelRows:
    keys = np.arange(len(LENGTHS) * 16, dtype=np.uint8).reshape(-1, 16)
    tokens = [np.arange(length, dtype=np.int32) for length in LENGTHS]
    spans = [np.array([1, length], np.int32) for length in LENGTHS]
    return assemble_rows(keys, keys, tokens, spans, labels, record)


def fidelity(record: RecordSpec, labels: list[RowLabels]) -> Fidelity:
    found = measure(labels, assemble(labels, record), record)
    assert found is not None
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_whole_labels_lose_next_to_nothing(kind: str) -> None:
    record = KINDS[kind]
    labels = make_labels(record, rate=0.25)
    found = fidelity(record, labels)
    assert found.labels == sum(len(row.audit.labels) for row in labels if row.audit)
    assert abs(found.labels - 0.25 * sum(n - 1 for n in LENGTHS)) <= len(LENGTHS)
    assert -1e-6 < found.mean_kl < 1e-5
    assert found.missed_mass < 1e-6
    heads = np.concatenate([np.exp(row.tail_logmass) for row in labels])
    assert abs(found.covered_mass - (1 - heads.mean())) < 0.1


def test_rounding_shows_and_is_what_both_ways_of_measuring_say() -> None:
    for kind, record in KINDS.items():
        coarse = record.model_copy(update={"logprob_bits": 3})
        labels = make_labels(coarse, rate=1.0)
        stored = assemble(labels, coarse)
        found = measure(labels, stored, coarse)
        assert found is not None
        by_labels = rounding_kl(labels, stored, coarse)
        assert found.mean_kl == pytest.approx(by_labels.mean(), rel=1e-3), kind
        assert found.max_kl == pytest.approx(by_labels.max(), rel=1e-3), kind
        assert found.mean_kl > 1e-4, kind


def test_audit_finds_labels_of_the_neighbouring_position() -> None:
    record = KINDS["topk"]
    labels = make_labels(record, rate=1.0)
    shifted = [
        replace(row, **{name: np.roll(getattr(row, name), 1, axis=0) for name in MOVED})
        for row in labels
    ]
    assert fidelity(record, shifted).mean_kl > 0.1


MOVED = ("entry_ids", "entry_logprobs", "tail_logmass")


def test_audit_finds_a_head_of_the_wrong_ids() -> None:
    """As a selection by blocks that overlooks one would make; its masses are still right."""
    record = KINDS["topk"]
    rng = np.random.default_rng(3)
    logits = torch.from_numpy(rng.normal(size=(20, VOCAB_SIZE))).double() * 3
    order = logits.argsort(dim=1, descending=True)
    lengths = torch.full((20,), record.k)
    whole = audit_logits(logits, order[:, : record.k], lengths)
    torch.testing.assert_close(whole[:, -1], 1 - whole[:, -2], rtol=0, atol=1e-6)
    overlooked = torch.cat([order[:, :3], order[:, 4 : record.k + 1]], dim=1)
    found = audit_logits(logits, overlooked, lengths)
    missed = (found[:, -1] - (1 - found[:, -2])).max()
    fourth = torch.softmax(logits, dim=1).gather(1, order[:, 3:4]).max()
    assert 0.3 * fourth < missed <= fourth


def test_audited_labels_follow_the_row_key() -> None:
    key = bytes(range(16))
    assert audited_labels(key, 100, 0.0).tolist() == []
    assert audited_labels(key, 5, 1.0).tolist() == [0, 1, 2, 3, 4]
    found = audited_labels(key, 1000, 1 / 64)
    assert len(found) in (15, 16)
    assert np.diff(found).min() >= 63
    assert found.tolist() == audited_labels(key, 1000, 1 / 64).tolist()
    assert found.tolist() != audited_labels(bytes(16), 1000, 1 / 64).tolist()
    short = [len(audited_labels(bytes([n] * 16), 4, 1 / 64)) for n in range(256)]
    assert 4 <= sum(short) <= 32  # 16 expected
