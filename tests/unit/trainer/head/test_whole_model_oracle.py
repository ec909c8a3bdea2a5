"""Every loss through a whole small model, against dense float64: tied or not, accumulated or not.

The head's own gradients are compared in `test_fused_head`. Here they go on into an embedding that
may be the head itself, over one micro-batch or several with a chunk size of their own, and come
back as the gradient of the mean over all labels.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from schemas.spec import RecordSpec
from tests.support.distillation_oracle import dense_loss, drawn_targets, random_targets
from trainer.config.train import LossConfig
from trainer.head.fused_head import LogitTransform, fused_distillation_loss
from trainer.losses.targets import SparseTargets

L, H, V, T = 12, 6, 20, 9
SEED = 20
TEMPERATURES = (1.0, 0.5, 2.0)
KINDS = (
    "hard",
    "truncated",
    "renormalised",
    "ghost",
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_kl",
    "tvd",
)
TRANSFORMS = {
    "plain": LogitTransform(),
    "scaled": LogitTransform(scale=0.3),
    "capped": LogitTransform(softcap=2.0),
    "scaled and capped": LogitTransform(scale=1.7, softcap=2.0),
}
CASES = [
    (kind, temperature, alpha)
    for kind, temperature, alpha in itertools.product(KINDS, TEMPERATURES, (1.0, 0.4))
    if kind != "hard" or (temperature, alpha) == (1.0, 1.0)
]


class Model:
    """tanh(embedding[tokens] @ mix), then a head that may be the embedding."""

    def __init__(self, tied: bool) -> None:
        rng = np.random.default_rng(SEED)
        self.embedding = torch.from_numpy(rng.normal(0, 1, (V, H))).requires_grad_()
        self.mix = torch.from_numpy(rng.normal(0, 1, (H, H))).requires_grad_()
        other = torch.from_numpy(rng.normal(0, 1, (V, H))).requires_grad_()
        self.head = self.embedding if tied else other
        self.leaves = [self.embedding, self.mix] + ([] if tied else [other])

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.embedding[tokens] @ self.mix)


def batches(kind: str) -> list[tuple[torch.Tensor, SparseTargets]]:
    """Three micro-batches of unequal numbers of labels, one of them without any."""
    rng = np.random.default_rng(SEED)
    if kind == "forward_kl":
        record = RecordSpec(kind="threshold", tau=0.08, temperatures=TEMPERATURES[1:])
        many = drawn_targets(rng, record, T, V, L)
    else:
        many = random_targets(rng, T, V, L, TEMPERATURES[1:])
    tokens = [torch.from_numpy(rng.integers(0, V, L)) for _ in range(3)]
    return list(zip(tokens, (many, many.chunk(2, 6), many.chunk(0, 0)), strict=True))


def mean(model: Model, parts: list[tuple[torch.Tensor, SparseTargets]], loss, transform, fused):
    """The sums of the micro-batches, each over the weight of all: what accumulation adds up."""
    total = sum(float(targets.weights.sum()) for _, targets in batches(loss.kind))
    for tokens, targets in parts:
        if fused:
            found, _ = fused_distillation_loss(
                model.hidden(tokens), model.head, None, targets, loss, transform
            )
        else:
            found = dense_loss(model.hidden(tokens), model.head, None, targets, loss, transform)
        yield found / total


def joined(parts: list[tuple[torch.Tensor, SparseTargets]]) -> tuple[torch.Tensor, SparseTargets]:
    """The same labels in one micro-batch."""
    tokens = torch.cat([tokens for tokens, _ in parts])
    targets = [t for _, t in parts]
    merged = {
        name: torch.cat([getattr(t, name) for t in targets])
        for name in ("token_ids", "weights", "entry_ids", "entry_logprobs", "tail_logmass", "lse")
    }
    draws = targets[0].entry_draws
    lengths = torch.cat([t.entry_bounds.diff() for t in targets])
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return tokens, replace(
        targets[0],
        **merged,
        positions=torch.cat([t.positions + L * place for place, t in enumerate(targets)]),
        entry_bounds=bounds,
        entry_offsets=bounds,
        entry_draws=None if draws is None else torch.cat([t.entry_draws for t in targets]),
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kind", "temperature", "alpha"), CASES)
def test_gradients_of_the_whole_model(kind, temperature, alpha, tied):
    loss = LossConfig(kind=kind, temperature=temperature, alpha=alpha, chunk_tokens=4)
    apart = batches(kind)
    for transform in TRANSFORMS.values():
        model = Model(tied)
        expected = sum(mean(model, apart[:2], loss, transform, fused=False))
        theirs = torch.autograd.grad(expected, model.leaves)
        for parts in (apart, [joined(apart)]):
            value = 0.0
            for leaf in model.leaves:
                leaf.grad = None
            for found in mean(model, parts, loss, transform, fused=True):
                found.backward()  # one after the other, as accumulation does
                value += found.item()
            assert value == pytest.approx(expected.item(), rel=1e-10)
            for leaf, wanted in zip(model.leaves, theirs, strict=True):
                torch.testing.assert_close(leaf.grad, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize(("kind", "temperature", "alpha"), CASES)
def test_reported_loss_moves_as_its_gradient_says(kind, temperature, alpha, transform):
    """By finite differences, through a tied head."""
    loss = LossConfig(kind=kind, temperature=temperature, alpha=alpha, chunk_tokens=4)
    parts, model = batches(kind), Model(tied=True)
    for found in mean(model, parts, loss, transform, fused=True):
        found.backward()
    generator = torch.Generator().manual_seed(SEED)
    ways = [torch.randn(leaf.shape, generator=generator).double() for leaf in model.leaves]
    slope = sum(
        float((leaf.grad * way).sum()) for leaf, way in zip(model.leaves, ways, strict=True)
    )
    step, values = 1e-6, []
    for sign in (1, -1):
        moved = Model(tied=True)
        with torch.no_grad():
            for leaf, way in zip(moved.leaves, ways, strict=True):
                leaf += sign * step * way
            values.append(sum(float(v) for v in mean(moved, parts, loss, transform, fused=True)))
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5, abs=1e-8)
