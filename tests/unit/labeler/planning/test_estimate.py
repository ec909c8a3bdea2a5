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
from labeler.planning.corpus_sample import COUNTS, CorpusSample, Estimate, sample_corpus, scaled_up
from labeler.planning.estimate import describe, make_plan
from labeler.run.resources import Resources
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


def test_the_ratio_estimator_covers_the_truth() -> None:
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    sizes = rng.uniform(1e6, 4e6, 500)
    tokens = sizes * rng.uniform(0.2, 0.3, 500)
    covered, errors = 0, []
    for _ in range(300):
        chosen = rng.choice(500, 12, replace=False)
        found = scaled_up(tokens[chosen], sizes[chosen], float(sizes.sum()), 500)
        covered += abs(found.value - tokens.sum()) <= 2 * found.error
        errors.append(found.error / found.value)
    assert 0.85 < covered / 300 < 1.0
    assert max(errors) < 0.1
    assert scaled_up(tokens, sizes, float(sizes.sum()), 500) == Estimate(float(tokens.sum()))
    assert scaled_up(tokens[:1], sizes[:1], 1e9, 500).error == pytest.approx(
        scaled_up(tokens[:1], sizes[:1], 1e9, 500).value
    )


def test_a_small_corpus_is_counted_and_a_large_one_sampled(
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
    whole = sample_corpus(pieces, reader, FRESH, seed=1)
    assert whole.is_whole
    counts = {name: whole.counts[name].value for name in COUNTS}
    assert counts["rows_read"] > counts["rows"] >= 300  # duplicates are not labelled
    assert sum(len(request.token_ids) for request in whole.requests) == counts["tokens"]
    assert whole.counts["tokens"].error == 0.0
    monkeypatch.setattr("labeler.planning.corpus_sample.WHOLE_BYTES", 10)
    monkeypatch.setattr("labeler.planning.corpus_sample.SAMPLE_BYTES", 10)
    some = sample_corpus(pieces, reader, FRESH, seed=1)
    assert (some.is_whole, some.pieces_read) == (False, 8)
    estimate = some.counts["tokens"]
    assert abs(estimate.value - counts["tokens"]) < 4 * estimate.error + 0.1 * counts["tokens"]
    again = sample_corpus(pieces, reader, FRESH, seed=1)
    assert [r.row_key for r in again.requests] == [r.row_key for r in some.requests]


def sample(**counts: float) -> CorpusSample:
    found = {name: Estimate(counts[name], counts[name] * 0.01) for name in COUNTS}
    return CorpusSample(False, 8, found, [], tokens_per_s=1e9)


CALIBRATION = Calibration(
    start_s=36.0,
    seconds=10.0,
    timed_tokens=40_000,
    intervals_s=(2.0, 2.0, 2.0, 2.0, 2.0),
    unit_labels=(1000, 2000, 9000),
    unit_bytes=(43_000, 83_000, 363_000),  # 3,000 and 40 a label
    rows=12,
    tokens=13_000,
    rows_bad=0,
)


def test_a_plan_scales_what_was_measured(tmp_path: Path, tiny_model_dir: Path) -> None:
    job = config(tmp_path, tiny_model_dir, run={"unit_tokens": 100_000})
    resources = Resources(1.0, 1.0, 0, 1.0, min_replicas=1, max_replicas=8)
    found = sample(rows_read=20_000, rows=10_000, tokens=14_400_000, labels=14_000_000)
    plan = make_plan(job, found, CALIBRATION, resources, (64.0, 4.0), price_per_hour=2.5)
    assert plan.replicas == 4  # as many as the cluster has GPUs
    assert plan.tokens_per_s.expected == pytest.approx(4000)
    assert plan.hours.expected == pytest.approx(0.25 + 0.01)
    assert plan.hours.low < plan.hours.expected < plan.hours.high
    assert plan.units == 144
    assert plan.bytes.expected == pytest.approx(144 * 3000 + 40 * 14e6, rel=1e-6)
    assert plan.cost is not None
    assert plan.cost.expected == pytest.approx(0.26 * 4 * 2.5)
    assert plan.limited_by == "teachers"
    assert any("4 replicas" in line for line in describe(plan))
    slow = CorpusSample(False, 8, found.counts, [], tokens_per_s=100.0)
    assert make_plan(job, slow, CALIBRATION, resources, (64.0, 4.0)).limited_by == "tokenising"


def test_nothing_left_is_planned_as_nothing(tmp_path: Path, tiny_model_dir: Path) -> None:
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
