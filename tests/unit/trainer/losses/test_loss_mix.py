"""Mixes of targets: the sum of their losses and gradients by shares, in one pass."""

import numpy as np
import pytest
import torch

from schemas.errors import ConfigError
from schemas.spec import RecordSpec
from tests.support.distillation_oracle import dense_loss, drawn_targets, random_targets
from trainer.config.train import LossConfig
from trainer.head.fused_head import LogitTransform, fused_distillation_loss
from trainer.losses.compatibility import approximation, check_loss

L, H, V, T, SEED = 14, 6, 30, 11, 40
DRAWN = RecordSpec(kind="threshold", tau=0.06, temperatures=(2.0,))
MIXES = [
    ("ghost", {"reverse_kl": 0.3}),
    ("ghost", {"truncated": 0.2, "renormalised": 0.2, "tvd": 0.5}),
    ("jsd", {"skew_kl": 0.25}),
    ("forward_kl", {"reverse_kl": 0.5}),
    ("reverse_kl", {"forward_kl": 0.1, "ghost": 0.1}),
]


def inputs(drawn: bool):
    rng = np.random.default_rng(SEED)
    one = drawn_targets(rng, DRAWN, T, V, L) if drawn else random_targets(rng, T, V, L, (2.0,))
    hidden = torch.from_numpy(rng.normal(0, 1, (L, H))).requires_grad_()
    return hidden, torch.from_numpy(rng.normal(0, 1, (V, H))).requires_grad_(), one


@pytest.mark.parametrize(("kind", "mix"), MIXES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("alpha", [1.0, 0.4])
def test_mix_is_the_sum_of_its_targets(kind, mix, temperature, alpha):
    own = {"beta": 0.3, "skew": 0.2} if kind == "jsd" else {}
    loss = LossConfig(
        kind=kind, mix=mix, temperature=temperature, alpha=alpha, chunk_tokens=4, **own
    )
    hidden, weight, targets = inputs("forward_kl" in (kind, *mix))
    transform = LogitTransform(scale=1.3, softcap=3.0)
    parts = loss.objectives()
    assert sum(share for share, _ in parts) == pytest.approx(1.0)
    expected = sum(
        share * dense_loss(hidden, weight, None, targets, one, transform) for share, one in parts
    )
    total, sums = fused_distillation_loss(hidden, weight, None, targets, loss, transform)
    assert total.item() == sums["loss"].item() == pytest.approx(expected.item(), rel=1e-10)
    theirs = torch.autograd.grad(expected, (hidden, weight))
    for ours, other in zip(torch.autograd.grad(total, (hidden, weight)), theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-10)


def test_every_target_of_a_mix_has_to_be_served():
    mixed = LossConfig(kind="ghost", mix={"forward_kl": 0.5})
    check_loss(mixed, DRAWN)
    with pytest.raises(ConfigError, match="needs labels with draws"):
        check_loss(mixed, RecordSpec(kind="topk"))
    warm = {"kind": "ghost", "mix": {"forward_kl": 0.5}, "temperature": 2.0}
    cold = RecordSpec(kind="threshold", tau=0.06, temperatures=(2.0,), draw_temperature=1.0)
    with pytest.raises(ConfigError, match=r"exact at 1\.0"):
        check_loss(LossConfig(**warm), cold)
    allowed = LossConfig(**warm, approximate_temperature=True)
    check_loss(allowed, cold)
    assert "ghost objective" in approximation(allowed, cold)
    assert approximation(allowed, DRAWN) == ""


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "hard", "mix": {"ghost": 0.5}}, r"1 - loss\.alpha"),
        ({"kind": "ghost", "mix": {"hard": 0.5}}, r"1 - loss\.alpha"),
        ({"kind": "ghost", "mix": {"ghost": 0.5}}, "shares of other objectives"),
        ({"kind": "ghost", "mix": {"tvd": 1.0}}, "with a sum below 1"),
        ({"kind": "ghost", "mix": {"tvd": 0.0}}, "expected positive shares"),
        ({"kind": "ghost", "mix": {"tvd": 0.5}, "beta": 0.3}, r"loss\.beta"),
    ],
)
def test_mixes_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**fields)
    LossConfig(kind="ghost", mix={"jsd": 0.5}, beta=0.3)
