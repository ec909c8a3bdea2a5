"""Early stopping on held-out rows, and the choice of those rows."""

from pathlib import Path

import numpy as np
import pytest

from schemas.errors import ConfigError
from schemas.spec import RecordSpec
from tests.support.training_runs import make_config, make_view
from trainer.checkpoints.train_progress import EarlyStopping
from trainer.config.train import EvalConfig
from trainer.data.row_order import epoch_steps, read_row_table
from trainer.evaluation.held_out import eval_loss, spread_rows

VOCABULARY = {f"t{i}": i for i in range(40)}


def stopped_at(values: list[float], **fields: object) -> int | None:
    """Number of the evaluation that ends a run, counted from 1."""
    config = EvalConfig.model_validate({"view": "v", "patience": 2, **fields})
    state = EarlyStopping()
    for number, value in enumerate(values, start=1):
        state = state.after(number, value, config)
        # As a checkpoint stores and restores it.
        state = EarlyStopping.model_validate_json(state.model_dump_json())
        if state.is_over(config):
            return number
    return None


def test_patience_counts_from_the_best() -> None:
    assert stopped_at([3.0, 2.0, 2.5, 1.9, 2.0, 1.9]) == 6
    assert stopped_at([3.0, 2.9, 2.8, 2.7]) is None
    assert stopped_at([3.0, 2.99, 2.98, 2.97], min_improvement=0.1) == 3


def test_without_patience_nothing_ends_a_run() -> None:
    assert stopped_at([1.0, 2.0, 3.0, 4.0], patience=0) is None
    assert not EarlyStopping(without_improvement=9).is_over(None)


def test_rows_are_spread_evenly_and_planned_as_any(tmp_path: Path) -> None:
    view = make_view(tmp_path, RecordSpec(kind="topk", k=3), VOCABULARY)
    data = make_config(tmp_path, view.url, "t", data={"epochs": 1, "steps": None}).data
    whole = read_row_table(view, data)
    some = spread_rows(whole, 10)
    assert len(some) == 10
    assert some.num_tokens.tolist() == whole.num_tokens[np.arange(10) * 96 // 10].tolist()
    planned = [row for step in epoch_steps(some, data, 0) for lane in step for row in lane.tolist()]
    assert sorted(planned) == list(range(10))
    assert spread_rows(whole, 0) is spread_rows(whole, 96) is whole


def test_labels_without_a_teacher_have_no_kl(tmp_path: Path) -> None:
    view = make_view(tmp_path, RecordSpec(kind="tokens"), VOCABULARY)
    sections = {"eval": {"view": "v"}}
    assert eval_loss(view, make_config(tmp_path, "v", "t", **sections)).kind == "hard"
    for key, changed in {
        "eval.metric": {"eval": {"view": "v", "metric": "kl"}},
        "checkpoint.best_metric": {"checkpoint": {"best_metric": "eval_kl"}},
    }.items():
        config = make_config(tmp_path, "v", "t", **{**sections, **changed})
        with pytest.raises(ConfigError, match=rf"KL to a teacher is requested by {key}, but"):
            eval_loss(view, config)
