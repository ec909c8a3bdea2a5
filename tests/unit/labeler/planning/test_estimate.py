"""A sampled corpus scaled up, and the plan that is made of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labeler.config import LabelConfig
from labeler.corpus.documents import RowTokenizer, text_spec
from labeler.corpus.listing import list_corpus
from labeler.corpus.piece_reader import KeySnapshot, PieceReader
from labeler.planning.calibration import Calibration
from labeler.planning.corpus_sample import COUNTS, CorpusSample, Range, sample_corpus, scale_up
from labeler.planning.estimate import BYTES_FACTOR, OVERHEAD_S, SPEED_FACTOR, describe, make_plan
from labeler.run.ray_cluster.resources import Resources
from labeler.teacher_model.identity import load_tokenizer

SEED = 20261125
NOTHING = np.empty(0, "S16")
FRESH = KeySnapshot(NOTHING, NOTHING, retry_quarantined=False)


def config(folder: Path, model: Path, **changes: Any) -> LabelConfig:
    values: dict[str, Any] = {
        "labels": str(folder / "labels"),
        "corpus": {"path": str(folder / "c.jsonl"), "format": "jsonl", "piece_bytes": 2000},
        "text": {"max_tokens": 64, "overlap": 8},
        "teacher": {"model": str(model)},
    }
    return LabelConfig.model_validate({**values, **changes})


def test_stated_range_of_a_sample_covers_the_truth() -> None:
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    sizes = rng.uniform(1e6, 4e6, 500)
    tokens = sizes * rng.uniform(0.2, 0.3, 500)
    total, widths, errors = float(sizes.sum()), [], []
    for _ in range(300):
        chosen = rng.choice(500, 12, replace=False)
        found = scale_up(tokens[chosen], sizes[chosen], total)
        assert found.low <= tokens.sum() <= found.high
        widths.append(found.high / found.low)
        errors.append(abs(found.expected / tokens.sum() - 1))
    assert max(widths) < 1.5  # densities differ by no more
    assert max(errors) < 0.15
    counted = scale_up(tokens, sizes, total)
    assert counted.low == counted.expected == counted.high == float(tokens.sum())


def test_plan_counts_a_small_corpus_and_samples_a_large_one(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(SEED)
    texts = [" ".join(map(str, rng.integers(0, 9, rng.integers(5, 90)))) for _ in range(300)]
    lines = [json.dumps({"text": text}) + "\n" for text in [*texts, *texts[:30]]]
    (tmp_path / "c.jsonl").write_text("".join(lines))
    job = config(tmp_path, tiny_model_dir)
    tokenizer = load_tokenizer(job.teacher)
    text = text_spec(job.text, tokenizer, "text")
    reader = PieceReader(job.corpus, text, None, RowTokenizer(tokenizer, job.corpus, text, 320))
    pieces = list_corpus(job.corpus)
    assert len(pieces) > 10
    read: list[tuple[int, ...]] = []
    whole = sample_corpus(pieces, reader, FRESH, 1, lambda *counts: read.append(counts))
    assert whole.is_whole
    counts = {name: whole.counts[name].expected for name in COUNTS}
    assert read[-1] == (len(pieces), len(pieces), counts["tokens"])
    assert len(read) == len(pieces)
    assert counts["rows_read"] > counts["rows"] >= 300  # duplicates are not labelled
    assert sum(len(request.token_ids) for request in whole.requests) == counts["tokens"]
    assert whole.counts["tokens"].low == whole.counts["tokens"].high
    monkeypatch.setattr("labeler.planning.corpus_sample.WHOLE_BYTES", 10)
    monkeypatch.setattr("labeler.planning.corpus_sample.SAMPLE_BYTES", 10)
    some = sample_corpus(pieces, reader, FRESH, 1, lambda *_: None)
    assert (some.is_whole, some.pieces_read) == (False, 8)
    estimate = some.counts["tokens"]
    # The last tenth of the rows are duplicates, which a sample without their originals counts.
    assert 0.9 * estimate.low <= counts["tokens"] <= estimate.high
    assert estimate.expected == pytest.approx(counts["tokens"], rel=0.15)
    again = sample_corpus(pieces, reader, FRESH, 1, lambda *_: None)
    assert [r.row_key for r in again.requests] == [r.row_key for r in some.requests]


def sample(tokens_per_s: float = 1e9, **counts: float) -> CorpusSample:
    found = {
        name: Range(expected=counts[name], low=counts[name] * 0.98, high=counts[name] * 1.02)
        for name in COUNTS
    }
    return CorpusSample(False, 8, 80, 10**9, found, [], tokens_per_s)


CALIBRATION = Calibration(
    start_s=36.0,
    tokens_per_s=4000.0,
    rows=12,
    tokens=13_000,
    labels=12_000,
    size_bytes=480_000,
)


def test_plan_scales_what_was_measured(tmp_path: Path, tiny_model_dir: Path) -> None:
    job = config(tmp_path, tiny_model_dir, run={"unit_tokens": 100_000})
    resources = Resources(1.0, 1.0, 0, 1.0, min_replicas=1, max_replicas=8)
    counts = {"rows_read": 20_000, "rows": 10_000, "tokens": 14_400_000, "labels": 14_000_000}
    found = sample(**counts)
    plan = make_plan(job, found, CALIBRATION, resources, (64.0, 4.0), price_per_hour=2.5)
    assert plan.replicas == 4  # as many as the cluster has GPUs
    assert plan.tokens_per_s == pytest.approx(4000)
    assert plan.hours.expected == pytest.approx(0.25 + 0.01)
    assert plan.hours.low == pytest.approx((0.25 * 0.98 + 0.01) / SPEED_FACTOR)
    most = (0.25 * 1.02 + 0.01) * SPEED_FACTOR + OVERHEAD_S / 3600
    assert plan.hours.high == pytest.approx(most)
    assert plan.units == 144
    assert plan.bytes.expected == pytest.approx(40 * 14e6)
    assert plan.bytes.high == pytest.approx(40 * 14e6 * 1.02 * BYTES_FACTOR)
    assert plan.cost is not None
    assert plan.cost.expected == pytest.approx(0.26 * 4 * 2.5)
    assert plan.limited_by == "teachers"
    assert any("4 replicas" in line for line in describe(plan))
    slow = make_plan(job, sample(100.0, **counts), CALIBRATION, resources, (64.0, 4.0))
    assert slow.limited_by == "tokenising"
    assert slow.hours.expected > plan.hours.expected


def test_plan_of_a_finished_corpus_is_zero(tmp_path: Path, tiny_model_dir: Path) -> None:
    found = sample(rows_read=20_000, rows=0, tokens=0, labels=0)
    resources = Resources(1.0, 0.0, 0, 1.0)
    plan = make_plan(config(tmp_path, tiny_model_dir), found, None, resources, (2.0, 0.0))
    assert (plan.hours.expected, plan.bytes.expected, plan.units) == (0.0, 0.0, 0)
    assert plan.cost is None


def test_responses_are_counted_as_they_were_sampled(tmp_path: Path, tiny_model_dir: Path) -> None:
    job = config(tmp_path, tiny_model_dir, generate={"n": 2, "max_tokens": 32})
    found = sample(rows_read=100, rows=100, tokens=1000, labels=0)
    plan = make_plan(job, found, CALIBRATION, Resources(1.0, 0.0, 0, 1.0), (2.0, 0.0))
    assert plan.tokens.expected == pytest.approx(100 * 13_000 / 12)
    assert plan.labels.expected == pytest.approx(100 * 12_000 / 12)
