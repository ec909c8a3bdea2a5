"""Labels with draws: what the trainer makes of them, by hand-worked examples."""

from pathlib import Path

import numpy as np
import pytest
import torch

from schemas.errors import ConfigError, RecordError
from schemas.record import LabelRows
from schemas.spec import RecordSpec
from tests.support.training_runs import make_config
from trainer.config.train import LossConfig
from trainer.engine.export import model_card
from trainer.head.fused_head import fused_distillation_loss
from trainer.losses.compatibility import approximation, check_loss, effective_kind
from trainer.losses.targets import SparseTargets, build_targets
from trainer.losses.teacher_weights import teacher_estimate, teacher_partition

THRESHOLD = RecordSpec(kind="threshold", tau=0.15, temperatures=(2.0,))
SAMPLED = RecordSpec(kind="sampled", draws=8)
KEYS = np.zeros((1, 16), np.uint8)
TOKENS = np.array([3, 4, 5, 6], np.int32)


def threshold_rows(**changes: object) -> LabelRows:
    """Labels at 1 and 2: heads {4: .6, 1: .2} and {5: .7}; draws {7: .1, 9: .05} and {2: .12}."""
    columns = {
        "row_key": KEYS,
        "content_key": KEYS,
        "token_ids": TOKENS,
        "token_offsets": np.array([0, 4]),
        "label_spans": np.array([1, 3], np.int32),
        "span_offsets": np.array([0, 2]),
        "head_len": np.array([2, 1], np.uint16),
        "tail_len": np.array([2, 1], np.uint16),
        "entry_ids": np.array([4, 1, 7, 9, 5, 2], np.int32),
        "entry_logprobs": np.log([0.6, 0.2, 0.1, 0.05, 0.7, 0.12]).astype(np.float16),
        "tail_logmass": np.log([0.2, 0.3]).astype(np.float16),
        "lse": np.log([[1.9], [1.7]]).astype(np.float16),
    }
    return LabelRows(**{**columns, **changes})


def sampled_rows() -> LabelRows:
    return threshold_rows(
        head_len=np.array([0, 0], np.uint16),
        tail_len=np.array([4, 2], np.uint16),
        entry_ids=np.array([1, 4, 7, 9, 2, 5], np.int32),
        entry_counts=np.array([2, 4, 1, 1, 1, 7], np.uint8),
        tail_logmass=np.zeros(2, np.float16),
        lse=None,
    )


def build(rows: LabelRows, record: RecordSpec = THRESHOLD, vocab_size: int = 20) -> SparseTargets:
    return build_targets(rows, np.array([0]), record, vocab_size)


def estimate(targets: SparseTargets, temperature: float) -> torch.Tensor:
    return teacher_estimate(targets, temperature, targets.segments(), torch.float64).weights


def test_entries_know_how_often_they_were_drawn():
    assert build(threshold_rows()).entry_draws.tolist() == [0, 0, 1, 1, 0, 1]
    assert build(sampled_rows(), SAMPLED).entry_draws.tolist() == [2, 4, 1, 1, 1, 7]
    assert build(threshold_rows()).chunk(1, 2).entry_draws.tolist() == [0, 1]
    with pytest.raises(RecordError, match="entry_counts was not read"):
        build(threshold_rows(), SAMPLED)


def test_draws_at_their_own_temperature_weigh_tau_or_their_share():
    at_one = THRESHOLD.model_copy(update={"draw_temperature": 1.0})
    weights = estimate(build(threshold_rows(), at_one), 1.0)
    assert weights.tolist() == pytest.approx([0.6, 0.2, 0.15, 0.15, 0.7, 0.15], rel=2e-3)
    assert weights[:2].sum().item() == pytest.approx(1 - np.exp(np.float16(np.log(0.2))), rel=1e-3)
    weights = estimate(build(threshold_rows()), 2.0)
    assert weights[[2, 3, 5]].tolist() == pytest.approx([0.15] * 3)
    heads = np.sqrt([0.6, 0.2, 0.7]) / [1.9, 1.9, 1.7]
    assert weights[[0, 1, 4]].tolist() == pytest.approx(heads, rel=2e-3)
    weights = estimate(build(sampled_rows(), SAMPLED), 1.0)
    assert weights.tolist() == pytest.approx(np.array([2, 4, 1, 1, 1, 7]) / 8)


def test_draws_at_another_temperature_are_weighed_by_the_ratio():
    """Drawn from p_2 = sqrt(p) / 1.9 and used at 1: tau * p / p_2."""
    weights = estimate(build(threshold_rows()), 1.0)
    expected = 0.15 * np.array([0.1, 0.05]) / (np.sqrt([0.1, 0.05]) / 1.9)
    assert weights[2:4].tolist() == pytest.approx(expected, rel=3e-3)


def test_partition_gives_draws_their_own_probability_and_the_bucket_the_rest():
    targets = build(threshold_rows())
    partition = teacher_partition(targets, 1.0, targets.segments(), torch.float64)
    weights = partition.log_weights(targets.segments()).exp()
    assert weights.tolist() == pytest.approx([0.6, 0.2, 0.1, 0.05, 0.7, 0.12], rel=2e-3)
    assert partition.tail.tolist() == pytest.approx([0.05, 0.18], rel=1e-2)
    over = build(threshold_rows(tail_logmass=np.log([0.1, 0.3]).astype(np.float16)))
    partition = teacher_partition(over, 1.0, over.segments(), torch.float64)
    assert partition.tail[0].item() == 0.0
    sampled = build(sampled_rows(), SAMPLED)
    partition = teacher_partition(sampled, 1.0, sampled.segments(), torch.float64)
    assert partition.tail.min() > 0


def test_draw_the_student_lacks_leaves_the_rest_alone():
    """Ids 7 and 9 are absent: the mass off the head, and every other weight, stay as they were."""
    full, folded = build(threshold_rows()), build(threshold_rows(), vocab_size=7)
    assert folded.entry_ids.tolist() == [4, 1, 5, 2]
    assert torch.equal(folded.tail_logmass, full.tail_logmass)
    assert torch.equal(estimate(folded, 1.0), estimate(full, 1.0)[[0, 1, 4, 5]])
    torch.testing.assert_close(estimate(folded, 2.0), estimate(full, 2.0)[[0, 1, 4, 5]])
    partition = teacher_partition(folded, 1.0, folded.segments(), torch.float64)
    assert partition.tail[0].item() == pytest.approx(0.2, rel=1e-2)


def test_position_whose_draws_are_all_absent_counts_for_nothing_or_is_an_error():
    rows = threshold_rows(
        head_len=np.array([0, 0], np.uint16),
        tail_len=np.array([1, 5], np.uint16),
        entry_ids=np.array([9, 1, 2, 3, 4, 5], np.int32),
        entry_counts=np.array([8, 1, 2, 3, 1, 1], np.uint8),
        tail_logmass=np.zeros(2, np.float16),
    )
    targets = build(rows, SAMPLED, vocab_size=9)
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = LossConfig(kind="forward_kl")
    total, _ = fused_distillation_loss(logits, torch.eye(9), None, targets, loss)
    total.backward()
    assert not logits.grad[0].any()
    assert logits.grad[1].any()
    with pytest.raises(RecordError, match="no logit for any entry of label 0"):
        fused_distillation_loss(logits, torch.eye(9), None, targets, LossConfig(kind="ghost"))


def test_above_the_temperature_of_the_draws_only_the_bounded_approximation_is_given():
    record = THRESHOLD.model_copy(update={"draw_temperature": 1.0})
    targets = build(threshold_rows(), record)
    logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    exact = LossConfig(kind="forward_kl", temperature=2.0)
    with pytest.raises(ConfigError, match="approximate_temperature"):
        fused_distillation_loss(logits, torch.eye(20), None, targets, exact)
    allowed = exact.model_copy(update={"approximate_temperature": True})
    ghost = LossConfig(kind="ghost", temperature=2.0)
    found, expected = (
        fused_distillation_loss(logits, torch.eye(20), None, targets, loss)[0]
        for loss in (allowed, ghost)
    )
    assert found.item() == expected.item()
    assert "ghost objective" in approximation(allowed, record)
    assert approximation(allowed, THRESHOLD) == ""
    config = make_config(Path("run"), "view", "tokenizer", loss=allowed.model_dump())
    card = model_card(config, ["f"], "v", 1, 1, 0.5, approximation(allowed, record))
    assert "approximated by the ghost objective" in card
    assert effective_kind(allowed, THRESHOLD) == "forward_kl"


@pytest.mark.parametrize(
    ("loss", "record", "message"),
    [
        (LossConfig(kind="ghost"), RecordSpec(kind="tokens"), 'record.kind = "tokens"'),
        (
            LossConfig(kind="ghost", temperature=2.0),
            RecordSpec(temperatures=(1.5, 4.0)),
            "1.0, 1.5, 4.0",
        ),
        (LossConfig(), RecordSpec(kind="topk"), 'use loss.kind = "ghost"'),
        (LossConfig(kind="forward_kl"), RecordSpec(kind="topp"), 'use loss.kind = "ghost"'),
        (LossConfig(kind="forward_kl", temperature=3.0), THRESHOLD, r"serve 1\.0, 2\.0"),
        (
            LossConfig(kind="forward_kl", temperature=4.0),
            RecordSpec(kind="sampled", temperatures=(0.5, 2.0, 4.0), draw_temperature=2.0),
            r"above 2\.0.*exact at 0\.5, 1\.0, 2\.0",
        ),
        (
            LossConfig(kind="forward_kl"),
            RecordSpec(kind="sampled", temperatures=(0.5,), draw_temperature=0.5),
            r"exact at 0\.5",
        ),
    ],
)
def test_losses_that_the_record_cannot_serve_are_refused_up_front(loss, record, message):
    with pytest.raises(ConfigError, match=message):
        check_loss(loss, record)


def test_losses_that_the_record_serves_pass():
    check_loss(LossConfig(kind="hard"), RecordSpec(kind="tokens"))
    check_loss(LossConfig(kind="ghost", temperature=4.0), RecordSpec(temperatures=(4.0,)))
    check_loss(LossConfig(kind="forward_kl", temperature=2.0), THRESHOLD)
    check_loss(LossConfig(kind="ghost"), SAMPLED)
    above = LossConfig(kind="forward_kl", temperature=2.0, approximate_temperature=True)
    check_loss(above, RecordSpec(kind="sampled", temperatures=(2.0,), draw_temperature=1.0))


def test_temperature_whose_normaliser_was_not_read_is_an_error():
    targets = build(threshold_rows(lse=None))
    with pytest.raises(ConfigError, match="lse was not read"):
        estimate(targets, 2.0)
    with pytest.raises(ConfigError, match="lse was not read"):
        estimate(targets, 1.0)  # the draws are from temperature 2
