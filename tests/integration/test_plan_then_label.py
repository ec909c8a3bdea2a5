"""The plan of a label job against the run that follows it."""

import json
from pathlib import Path

import numpy as np
import pytest

from labeler.config import LabelConfig
from labeler.planning.calibration import unit_bytes
from labeler.planning.job import plan_label_job
from labeler.run.job import run_label_job
from schemas.label_set.label_set import LabelSet

SEED = 7


@pytest.mark.usefixtures("ray_session")
def test_plan_predicts_what_the_run_takes(tmp_path: Path, tiny_model_dir: Path) -> None:
    rng = np.random.default_rng(SEED)
    texts = [" ".join(map(str, rng.integers(0, 99, rng.integers(20, 200)))) for _ in range(240)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = LabelConfig.model_validate(
        {
            "labels": str(tmp_path / "labels"),
            "corpus": {"path": str(corpus), "format": "jsonl", "piece_bytes": 20_000},
            "text": {"max_tokens": 256, "overlap": 16},
            "teacher": {"backend": "transformers", "model": str(tiny_model_dir)},
            "run": {"unit_tokens": 8000},
        }
    )
    plan = plan_label_job(config, progress=False, price_per_hour=1.0)
    assert not (tmp_path / "labels").exists()
    assert plan.exact_counts
    summary = run_label_job(config, progress=False)
    labels = LabelSet.open(config.labels)
    on_disk = sum(unit_bytes(labels.store, manifest) for manifest in labels.manifests())
    print(
        f"seed {SEED}; tokens {plan.tokens.expected:.0f} planned, {summary.tokens} found; bytes "
        f"{plan.bytes.expected:.0f} / {on_disk}; units {plan.units} / {len(labels.manifests())}; "
        f"seconds {3600 * plan.hours.expected:.1f} / {summary.seconds:.1f}"
    )
    assert plan.rows.expected == summary.rows_labelled
    assert plan.tokens.expected == pytest.approx(summary.tokens, rel=0.03)
    assert plan.labels.expected == pytest.approx(summary.labels, rel=0.03)
    assert plan.bytes.expected == pytest.approx(on_disk, rel=0.15)
    assert plan.bytes.low <= on_disk <= plan.bytes.high
    assert plan.units == pytest.approx(len(labels.manifests()), abs=3)
    assert plan.hours.low <= summary.seconds / 3600 <= plan.hours.high
    nothing = plan_label_job(config, progress=False)
    assert (nothing.rows.expected, nothing.hours.expected) == (0.0, 0.0)
    assert nothing.rows_read.expected == summary.rows_read
