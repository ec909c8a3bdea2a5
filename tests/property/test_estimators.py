"""Statistics of labels with draws, on the demo teacher's own distributions.

The seed decides positions, student and draws; it is printed with what was measured.
"""

import pytest
import torch

from benchmarks.demo_positions import Positions, teacher_positions
from benchmarks.estimators import Measured, as_text, measure, perturbed_student
from benchmarks.records import matched_records
from schemas.spec import RecordSpec

SEED = 0
KINDS = ("topk", "sampled", "threshold")


@pytest.fixture(scope="module")
def positions() -> Positions:
    return teacher_positions(128, SEED)


@pytest.fixture(scope="module")
def student(positions: Positions) -> torch.Tensor:
    return perturbed_student(positions.logits, SEED)


@pytest.fixture(scope="module")
def measured(positions: Positions, student: torch.Tensor) -> dict[float, dict[str, Measured]]:
    found = {}
    for temperature in (1.0, 2.0):
        records = matched_records(positions.logits, temperature)
        found[temperature] = {
            kind: measure(positions, student, records[kind], temperature, num_labels=32)
            for kind in KINDS
        }
    print(f"\nseed {SEED}\n{as_text(found)}")
    return found


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_labels_with_draws_converge_to_the_dense_gradient_and_heads_do_not(measured, temperature):
    """What is left of the error of a mean of 32 labels is the noise in it, within a share of it."""
    found = measured[temperature]
    for kind in ("sampled", "threshold"):
        assert found[kind].relative_bias < 0.4 * found[kind].noise_of_mean
        assert found[kind].ids_per_label == pytest.approx(found["topk"].ids_per_label, abs=0.6)
    assert found["topk"].relative_bias > 0.05


def test_error_of_the_mean_falls_as_for_independent_labels(positions, student, measured):
    for temperature, kinds in measured.items():
        records = matched_records(positions.logits, temperature)
        for kind in ("sampled", "threshold"):
            few = measure(positions, student, records[kind], temperature, num_labels=8)
            fallen = kinds[kind].noise_of_mean / few.noise_of_mean
            assert fallen == pytest.approx((8 / 32) ** 0.5, rel=0.25)


def test_threshold_has_less_variance_than_sampled(measured):
    """How much less depends on how sharp the teacher is; the benchmark's text says why.

    Over four sets of 160 positions, the share of the variance of ``sampled`` at temperature 1 was
    0.65 to 0.69 in the logits and 0.44 to 0.50 in hidden states; at 2, where this teacher is nearly
    flat, 0.99 to 1.01 and 0.77 to 0.81. Bounds are about a tenth above.
    """
    sampled, threshold = (measured[1.0][kind] for kind in ("sampled", "threshold"))
    assert threshold.variance <= 0.75 * sampled.variance
    assert threshold.hidden_variance <= 0.55 * sampled.hidden_variance
    sampled, threshold = (measured[2.0][kind] for kind in ("sampled", "threshold"))
    assert threshold.variance <= 1.05 * sampled.variance
    assert threshold.hidden_variance <= 0.9 * sampled.hidden_variance


@pytest.mark.parametrize("kind", ["sampled", "threshold"])
def test_labels_drawn_at_two_are_unbiased_at_one(positions, student, kind):
    records = {
        "sampled": RecordSpec(kind="sampled", draws=32, temperatures=(2.0,)),
        "threshold": RecordSpec(kind="threshold", tau=1 / 32, temperatures=(2.0,)),
    }
    found = measure(positions, student, records[kind], temperature=1.0, num_labels=32)
    assert found.relative_bias < 0.4 * found.noise_of_mean
