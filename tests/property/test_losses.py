"""What holds for every loss, over random shapes, ragged heads, sharpness, temperature and alpha."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.spec import RecordSpec
from tests.support.distillation_oracle import dense_loss, drawn_targets, random_targets
from trainer.config.train import LossConfig
from trainer.head.fused_head import fused_distillation_loss
from trainer.losses.targets import SparseTargets

TEMPERATURES = (0.7, 3.0)

shapes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "num_labels": st.integers(1, 12),
        "vocab_size": st.integers(4, 50),
        "spread": st.sampled_from([0.1, 1.0, 4.0, 12.0]),
    }
)
records = st.one_of(
    st.builds(
        RecordSpec,
        kind=st.just("threshold"),
        tau=st.sampled_from([0.02, 0.1, 0.4]),
        temperatures=st.just(TEMPERATURES),
    ),
    st.builds(
        RecordSpec,
        kind=st.just("sampled"),
        draws=st.sampled_from([1, 8, 40]),
        temperatures=st.just(TEMPERATURES),
    ),
)
losses = st.builds(
    LossConfig,
    kind=st.sampled_from(
        ["truncated", "renormalised", "ghost", "reverse_kl", "jsd", "skew_kl", "tvd"]
    ),
    alpha=st.sampled_from([0.0, 0.25, 1.0]),
    temperature=st.sampled_from([1.0, *TEMPERATURES]),
    chunk_tokens=st.integers(1, 13),
)


def make(
    seed: int, num_labels: int, vocab_size: int, spread: float
) -> tuple[SparseTargets, torch.Tensor]:
    """Labels, and student logits [T, V] of a like spread, float64."""
    rng = np.random.default_rng(seed)
    targets = random_targets(rng, num_labels, vocab_size, num_labels, TEMPERATURES, spread=spread)
    logits = torch.from_numpy(rng.normal(0, spread, (num_labels, vocab_size)))
    return targets, logits.requires_grad_()


def run(
    targets: SparseTargets, logits: torch.Tensor, loss: LossConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and its gradient with respect to the logits: the head is the identity."""
    eye = torch.eye(logits.shape[1], dtype=logits.dtype)
    total, _ = fused_distillation_loss(logits, eye, None, targets, loss)
    (gradient,) = torch.autograd.grad(total, logits)
    return total.detach(), gradient


@settings(max_examples=80, deadline=None, derandomize=True)
@given(shapes, losses)
def test_every_target_equals_its_dense_definition(shape, loss):
    targets, logits = make(**shape)
    total, gradient = run(targets, logits, loss)
    eye = torch.eye(logits.shape[1], dtype=logits.dtype)
    expected = dense_loss(logits, eye, None, targets, loss)
    (theirs,) = torch.autograd.grad(expected, logits)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-9)
    torch.testing.assert_close(gradient, theirs, rtol=1e-6, atol=1e-8)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shapes, losses)
def test_gradients_of_logits_sum_to_zero_and_shifts_change_nothing(shape, loss):
    targets, logits = make(**shape)
    total, gradient = run(targets, logits, loss)
    scale = float(gradient.abs().max()) + 1e-9
    assert float(gradient.sum(1).abs().max()) <= 1e-9 * scale * logits.shape[1]
    shifted = (logits.detach() + 5.0).requires_grad_()
    moved, moved_gradient = run(targets, shifted, loss)
    assert moved.item() == pytest.approx(total.item(), rel=1e-9, abs=1e-9)
    torch.testing.assert_close(moved_gradient, gradient, rtol=1e-6, atol=1e-9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shapes, losses, st.integers(1, 13))
def test_loss_does_not_depend_on_the_chunk_size(shape, loss, chunk_tokens):
    targets, logits = make(**shape)
    total, gradient = run(targets, logits, loss)
    other = run(targets, logits, loss.model_copy(update={"chunk_tokens": chunk_tokens}))
    assert other[0].item() == pytest.approx(total.item(), rel=1e-12, abs=1e-12)
    torch.testing.assert_close(other[1], gradient, rtol=1e-10, atol=1e-12)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(shapes, records, losses, st.booleans())
def test_every_target_on_labels_with_draws_equals_its_dense_definition(
    shape, record, loss, unbiased
):
    rng = np.random.default_rng(shape["seed"])
    num_labels, vocab_size = shape["num_labels"], shape["vocab_size"]
    targets = drawn_targets(rng, record, num_labels, vocab_size, num_labels, shape["spread"])
    logits = torch.from_numpy(rng.normal(0, shape["spread"], (num_labels, vocab_size)))
    logits.requires_grad_()
    if unbiased:
        loss = loss.model_copy(update={"kind": "forward_kl"})
    total, gradient = run(targets, logits, loss)
    eye = torch.eye(vocab_size, dtype=logits.dtype)
    expected = dense_loss(logits, eye, None, targets, loss)
    (theirs,) = torch.autograd.grad(expected, logits)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-8)
    torch.testing.assert_close(gradient, theirs, rtol=1e-6, atol=1e-8)
    assert float(gradient.sum(1).abs().max()) <= 1e-9 * (1 + float(gradient.abs().max()))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shapes, st.sampled_from([1.0, *TEMPERATURES]))
def test_ghost_is_a_divergence(shape, temperature):
    """Both sides are distributions over S and the bucket, so it is never negative."""
    targets, logits = make(**shape)
    loss = LossConfig(kind="ghost", temperature=temperature)
    total, _ = run(targets, logits, loss)
    assert total.item() >= -1e-9


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shapes, losses, st.floats(-90.0, 90.0))
def test_float32_gradients_stay_finite_however_sure_the_student(shape, loss, offset):
    targets, logits = make(**shape)
    student = logits.detach().float()
    student[targets.segments().rows, targets.entry_ids.long()] += offset
    total, gradient = run(targets, student.requires_grad_(), loss)
    assert torch.isfinite(total)
    assert torch.isfinite(gradient).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shapes, losses)
def test_loss_is_linear_in_the_weights_of_positions(shape, loss):
    targets, logits = make(**shape)
    total, gradient = run(targets, logits, loss)
    tripled = run(replace(targets, weights=3 * targets.weights), logits, loss)
    assert tripled[0].item() == pytest.approx(3 * total.item(), rel=1e-6, abs=1e-9)
    torch.testing.assert_close(tripled[1], 3 * gradient, rtol=1e-6, atol=1e-9)
