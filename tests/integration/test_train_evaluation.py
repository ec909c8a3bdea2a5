"""Evaluation while training on a mixture: the right numbers, and the end where they stand still."""

from pathlib import Path

import pytest

from schemas.spec import RecordSpec
from tests.support.rank_pool import train
from tests.support.training_runs import curve, losses, make_config, make_view
from trainer.config.evaluate import EvaluateConfig
from trainer.evaluation.compare import run_evaluate


def test_run_stops_early_where_the_student_learns_nothing(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(tiny_model_dir).get_vocab()
    view = make_view(tmp_path, RecordSpec(kind="topk", k=4), vocabulary)
    other = make_view(tmp_path / "other", RecordSpec(kind="topk", k=4), vocabulary, 24, seed=1)
    mixture = [{"view": view.url, "weight": 1.0}, {"view": other.url, "weight": 1.0}]
    job = make_config(
        tmp_path / "run",
        mixture,
        "",
        student={"path": str(tiny_model_dir), "config": {}},
        data={"sequences_per_step": 3, "steps": 24},
        optimizer={"lr": 1e-12},
        ray={"num_workers": 2},
        eval={"view": view.url, "every_steps": 2, "max_rows": 0, "patience": 2,
              "min_improvement": 1e-4},
    )  # fmt: skip
    summary = train(job)
    assert (summary.steps, summary.stopped_early, summary.best_eval_step) == (6, True, 2)
    assert len(losses(tmp_path / "run")) == 6
    points = curve(tmp_path / "run", "eval")
    assert [point["step"] for point in points] == [2, 4, 6]
    assert {point["labels"] for point in points} == {view.num_labels}
    student = summary.exported
    dense = run_evaluate(
        EvaluateConfig(view=view.url, teacher=str(tiny_model_dir), students={"s": student}), False
    )
    assert points[-1]["ce"] == pytest.approx(dense.models["s"].cross_entropy, abs=1e-4)
    assert points[-1]["kl"] > 0.0
    point = curve(tmp_path / "run", "train")[-1]
    assert point["peak_rss_bytes"] > 10**8
    assert "stopping early: eval.ce was lowest" in capsys.readouterr().err
    assert train(job) == summary
