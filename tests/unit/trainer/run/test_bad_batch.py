"""What a person reads when a step stopped a run."""

import math
from typing import Any

from trainer.engine.guards import GRADIENT, LOSS, BadStep
from trainer.run.bad_batch import BadBatch, BadRow, summary


def row(number: int, is_finite: bool | None) -> BadRow:
    return BadRow(
        view_row=number,
        row_key="ab",
        label_set="labels",
        shard="shards/x.parquet",
        row_group=1,
        row=7,
        num_tokens=9,
        lane=0,
        rank=0,
        micro_batch=0,
        loss=1.0 if is_finite else None,
        is_finite=is_finite,
    )


def text(bad: BadStep, *rows: BadRow, checkpoint: str = "run/checkpoints/step_8") -> str:
    fields: dict[str, Any] = {"value": None, "median": bad.median, "checkpoint": checkpoint}
    report = BadBatch(step=bad.step, what=bad.what, rows=list(rows), **fields)
    return summary(bad, report, "run/bad_batch.json")


NAN = BadStep(LOSS, math.nan, None, 9)


def test_report_names_the_row_that_gives_nan() -> None:
    found = text(NAN, row(41, False), row(2, True), row(3, None))
    assert found.startswith("the loss of step 9 is nan, as it is for 1 of 2 rows run on their own")
    assert "row 41 of the view (shard shards/x.parquet, row group 1, row 7)" in found
    assert "run/bad_batch.json lists the 3 rows of the step" in found
    assert "the last good checkpoint is run/checkpoints/step_8. " in found


def test_corrupted_weights_are_distinguished_from_bad_rows() -> None:
    assert "every row fails on its own: the student's weights are corrupted" in text(
        NAN, row(1, False), row(2, False), row(3, None)
    )


def test_report_of_a_gradient_blames_no_row() -> None:
    found = text(BadStep(GRADIENT, math.inf, None, 3), row(1, None), checkpoint="")
    assert found.startswith("the gradient norm of step 3 is inf; run/bad_batch.json")
    assert "no checkpoint precedes it. Lower optimizer.lr" in found


def test_report_of_a_spike_says_how_large_it_is_and_how_to_resume() -> None:
    found = text(BadStep(LOSS, 12.5, 2.5, 30), row(1, True))
    assert found.startswith("the loss of step 30 is 12.5, 5.0 times the median before it; ")
    assert "guard.spikes=warn" in found
