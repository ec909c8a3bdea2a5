"""Divergences on S and the bucket: masses of zero, limits, bounds, and what labels can serve."""

from typing import get_args

import numpy as np
import pytest
import torch

from schemas.errors import ConfigError
from schemas.spec import RecordSpec
from tests.support.distillation_oracle import dense_loss, drawn_targets, random_targets
from trainer.config.train import LossConfig, LossKind
from trainer.head.fused_head import fused_distillation_loss
from trainer.losses.compatibility import check_loss, effective_kind
from trainer.losses.divergences import DIVERGENCES, SMALLEST_MASS, Masses, divergence_terms
from trainer.losses.objectives import PARTITION_OBJECTIVES

T, V = 23, 40
KINDS = tuple(DIVERGENCES)
RECORDS = [
    RecordSpec(kind="topk", temperatures=(2.0,)),
    RecordSpec(kind="topp", temperatures=(2.0,)),
    RecordSpec(kind="threshold", temperatures=(2.0,), draw_temperature=1.0),
    RecordSpec(kind="sampled", temperatures=(2.0,), draw_temperature=1.0),
]


def run(logits: torch.Tensor, targets, loss: LossConfig) -> tuple[float, torch.Tensor]:
    """Loss, and its gradient of the logits: the head is the identity."""
    leaf = logits.detach().requires_grad_()
    total, _ = fused_distillation_loss(leaf, torch.eye(V, dtype=leaf.dtype), None, targets, loss)
    (gradient,) = torch.autograd.grad(total, leaf)
    return total.item(), gradient


def inputs(seed: int):
    rng = np.random.default_rng(seed)
    targets = random_targets(rng, T, V, T, head_sizes=np.full(T, 5))
    return targets, torch.from_numpy(rng.normal(0, 1, (T, V)))


def test_config_names_exactly_the_objectives():
    objectives = {"hard", "forward_kl", *PARTITION_OBJECTIVES, *DIVERGENCES}
    assert set(get_args(LossKind)) == objectives


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masses_of_zero_on_either_side_or_both_give_numbers(kind, dtype):
    none = -torch.inf
    log_p = torch.tensor([none, none, 0.0, 0.0, -1.0, none], dtype=dtype)
    log_q = torch.tensor([none, 0.0, none, 0.0, none, -200.0], dtype=dtype)
    masses = Masses.from_logs(log_p, log_q)
    found = divergence_terms(masses, LossConfig(kind=kind))
    assert torch.isfinite(found.value).all()
    assert torch.isfinite(found.slope).all()
    assert found.value[0] == 0.0  # nothing on either side
    assert found.value[3].abs() < 1e-6  # the same on both
    # KL(q || p) does not look where q has nothing; the others do.
    assert (found.value[2] == 0.0) == (kind == "reverse_kl")


@pytest.mark.parametrize("kind", KINDS)
def test_student_equal_to_the_teacher_has_zero_loss(kind):
    targets, logits = inputs(0)
    ids = targets.entry_ids.long().view(T, 5)
    m = targets.tail_logmass.double().exp()
    w = targets.entry_logprobs.double().view(T, 5).exp()
    w = w * ((1 - m) / w.sum(1))[:, None]
    spread = logits.exp().scatter_(1, ids, 0.0)
    equal = (spread * (m / spread.sum(1))[:, None]).scatter_(1, ids, w).log()
    total, gradient = run(equal, targets, LossConfig(kind=kind))
    assert abs(total) < 1e-9
    if kind != "tvd":  # its slope jumps there
        assert gradient.abs().max() < 1e-9


@pytest.mark.parametrize(
    ("loss", "bound"),
    [
        (LossConfig(kind="jsd"), np.log(2)),
        (LossConfig(kind="skew_kl", skew=0.2), -np.log(0.2)),
        (LossConfig(kind="tvd"), 1.0),
        (LossConfig(kind="reverse_kl"), -np.log(SMALLEST_MASS)),
    ],
)
def test_every_divergence_is_bounded_and_not_negative(loss, bound):
    targets, logits = inputs(1)
    weight = float(targets.weights.sum())
    for sharpness in (0.0, 1.0, 30.0):
        total, _ = run(sharpness * logits, targets, loss)
        assert -1e-9 <= total <= bound * weight


def test_limits_of_the_mixtures_are_the_two_kls():
    """jsd over beta and over 1 - beta, and skew_kl, near the ends of their ranges."""
    targets, logits = inputs(2)
    forward = run(logits, targets, LossConfig(kind="ghost"))[0]
    reverse = run(logits, targets, LossConfig(kind="reverse_kl"))[0]
    near = 1e-6
    low = run(logits, targets, LossConfig(kind="jsd", beta=near))[0] / near
    high = run(logits, targets, LossConfig(kind="jsd", beta=1 - near))[0] / near
    skewed = run(logits, targets, LossConfig(kind="skew_kl", skew=near))[0]
    assert low == pytest.approx(forward, rel=1e-3)
    assert high == pytest.approx(reverse, rel=1e-3)
    assert skewed == pytest.approx(forward, rel=1e-3)


@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(kind="jsd", beta=0.2, alpha=0.6, temperature=2.0),
        LossConfig(kind="jsd", beta=0.9),
        LossConfig(kind="skew_kl", skew=0.5, temperature=2.0),
    ],
)
@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.kind)
def test_own_fields_count(loss, record):
    rng = np.random.default_rng(3)
    if record.has_draws:
        targets = drawn_targets(rng, record, T, V, T)
    else:
        targets = random_targets(rng, T, V, T, record.temperatures)
    logits = torch.from_numpy(rng.normal(0, 1, (T, V))).requires_grad_()
    total, gradient = run(logits, targets, loss)
    expected = dense_loss(logits, torch.eye(V, dtype=logits.dtype), None, targets, loss)
    assert total == pytest.approx(expected.item(), rel=1e-10)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])
    other = {"jsd": {"beta": 0.5}, "skew_kl": {"skew": 0.1}}[loss.kind]
    assert total != pytest.approx(run(logits, targets, loss.model_copy(update=other))[0], rel=1e-3)


def test_empty_bucket_of_the_teacher_gives_finite_gradients():
    """Draws that cover all of the tail leave a bucket of exactly nothing."""
    targets, logits = inputs(4)
    gone = torch.full_like(targets.tail_logmass, -torch.inf)
    targets = type(targets)(**{**vars(targets), "tail_logmass": gone})
    ids = targets.entry_ids.long().view(T, 5)
    for kind in KINDS:
        total, gradient = run(logits.float(), targets, LossConfig(kind=kind))
        assert np.isfinite(total)
        assert torch.isfinite(gradient).all()
        off = gradient.scatter(1, ids, 1.0)
        assert (off > 0).all(), "the student's mass off S is to fall"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.kind)
def test_every_record_with_a_teacher_serves_them_at_what_it_stores(kind, record):
    for temperature in (1.0, 2.0):  # above that of the draws as well: nothing is weighted by them
        loss = LossConfig(kind=kind, temperature=temperature)
        check_loss(loss, record)
        assert effective_kind(loss, record) == kind
    with pytest.raises(ConfigError, match=r"loss\.temperature = 3\.0 .* record\.temperatures"):
        check_loss(LossConfig(kind=kind, temperature=3.0), record)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_alone_serve_none_of_them(kind):
    with pytest.raises(ConfigError, match=rf'loss\.kind = "{kind}" needs a teacher'):
        check_loss(LossConfig(kind=kind), RecordSpec(kind="tokens"))
