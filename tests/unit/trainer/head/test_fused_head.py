import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from schemas.errors import ConfigError, VocabularyError
from tests.support.distillation_oracle import dense_loss, random_targets
from tests.support.head_inputs import RECORDS, TEMPERATURES, H, T, V, inputs
from trainer.config.train import LossConfig
from trainer.head.fused_head import METRICS, LogitTransform, fused_distillation_loss

DIVERGENCES = ("reverse_kl", "jsd", "skew_kl", "tvd")
KINDS = ("hard", "truncated", "renormalised", "ghost", *DIVERGENCES, "forward_kl")
CASES = [
    ("head", kind, temperature, alpha)
    for kind, temperature, alpha in itertools.product(
        KINDS[:-1], (1.0, *TEMPERATURES), (1.0, 0.3, 0.0)
    )
    if kind != "hard" or (temperature, alpha) == (1.0, 1.0)
]
for name, spec in RECORDS.items():
    if spec is not None:
        CASES += [
            (name, kind, temperature, alpha)
            for kind, temperature, alpha in itertools.product(
                DIVERGENCES, (1.0, *TEMPERATURES), (1.0, 0.3)
            )
        ]
        CASES += [(name, kind, 1.0, 1.0) for kind in ("truncated", "renormalised")]
        CASES += [(name, "ghost", temperature, 0.3) for temperature in (1.0, 2.0)]
        CASES += [
            (name, "forward_kl", temperature, alpha)
            for temperature, alpha in itertools.product((1.0, *TEMPERATURES), (1.0, 0.3))
            if temperature <= spec.drawn_at
        ]


def gradients(total: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(total, leaves))


@pytest.mark.parametrize(("record", "kind", "temperature", "alpha"), CASES)
@pytest.mark.parametrize("chunk_tokens", [7, 64])
def test_value_and_gradients_equal_the_dense_oracle(record, kind, temperature, alpha, chunk_tokens):
    hidden, weight, bias, targets = inputs(record=record)
    loss = LossConfig(kind=kind, temperature=temperature, alpha=alpha, chunk_tokens=chunk_tokens)
    transform = LogitTransform(scale=0.7, softcap=3.0)
    for b, tr in ((None, LogitTransform()), (bias, transform)):
        leaves = [hidden, weight] + ([] if b is None else [b])
        total, parts = fused_distillation_loss(hidden, weight, b, targets, loss, tr)
        expected = dense_loss(hidden, weight, b, targets, loss, tr)
        assert total.item() == pytest.approx(expected.item(), rel=1e-12)
        assert parts["loss"].item() == total.item()
        for ours, theirs in zip(
            gradients(3.0 * total, *leaves), gradients(3.0 * expected, *leaves), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("record", "kind", "temperature", "alpha"), CASES)
def test_reported_loss_is_the_one_whose_gradient_is_used(record, kind, temperature, alpha):
    hidden, weight, _, targets = inputs(1, record=record)
    loss = LossConfig(kind=kind, temperature=temperature, alpha=alpha, chunk_tokens=8)

    def value(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return fused_distillation_loss(h, w, None, targets, loss)[1]["loss"]

    total, _ = fused_distillation_loss(hidden, weight, None, targets, loss)
    d_hidden, d_weight = gradients(total, hidden, weight)
    rng = torch.Generator().manual_seed(0)
    step = 1e-5
    along_hidden = torch.randn(hidden.shape, generator=rng, dtype=torch.float64)
    along_weight = torch.randn(weight.shape, generator=rng, dtype=torch.float64)
    with torch.no_grad():
        h, w = step * along_hidden, step * along_weight
        slope_h = (value(hidden + h, weight) - value(hidden - h, weight)) / (2 * step)
        slope_w = (value(hidden, weight + w) - value(hidden, weight - w)) / (2 * step)
    assert (d_hidden * along_hidden).sum().item() == pytest.approx(slope_h.item(), rel=1e-6)
    assert (d_weight * along_weight).sum().item() == pytest.approx(slope_w.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("record", "kind", "temperature", "alpha"), CASES)
def test_lower_precisions_stay_close_to_float64(record, kind, temperature, alpha, dtype):
    hidden, weight, _, targets = inputs(2, record=record)
    loss = LossConfig(kind=kind, temperature=temperature, alpha=alpha, chunk_tokens=8)
    low = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
    high = [x.detach().double().requires_grad_() for x in low]
    total, _ = fused_distillation_loss(*low, None, targets, loss)
    expected = dense_loss(*high, None, targets, loss)
    assert total.dtype == torch.float32
    # Reverse KL takes the logarithm of a bucket that off T = 1 is 1 - sum of weights.
    exact = 1e-5 if kind != "reverse_kl" or temperature == 1.0 else 1e-3
    assert total.item() == pytest.approx(expected.item(), rel=exact)
    tolerance = exact if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(gradients(total, *low), gradients(expected, *high), strict=True):
        assert ours.dtype == dtype
        # 1e-6: what float32 leaves of a softmax, where the gradient itself is small.
        assert (ours.double() - theirs).abs().max() < tolerance * theirs.abs().max() + 1e-6


def test_many_chunks_do_not_drift_in_bfloat16():
    rng = np.random.default_rng(3)
    targets = random_targets(rng, 512, V, 512)
    hidden = torch.from_numpy(rng.normal(0, 1, (512, H))).bfloat16().requires_grad_()
    weight = torch.from_numpy(rng.normal(0, 1, (V, H))).bfloat16().requires_grad_()
    d_weight = [
        gradients(
            fused_distillation_loss(
                hidden, weight, None, targets, LossConfig(kind="ghost", chunk_tokens=c)
            )[0],
            weight,
        )[0]
        for c in (1, 512)
    ]
    torch.testing.assert_close(*d_weight, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("num_labels", [255, 511, 3070])
def test_mean_in_bfloat16_is_the_sum_over_the_number(num_labels):
    """Whichever is rounded before the product, 1 / N or the sum, all is off by up to 0.4%."""
    rng = np.random.default_rng(19)
    targets = random_targets(rng, 256, V, 256)
    hidden = torch.from_numpy(rng.normal(0, 1, (256, 64))).bfloat16().requires_grad_()
    weight = torch.from_numpy(rng.normal(0, 1, (V, 64))).bfloat16().requires_grad_()

    def total() -> torch.Tensor:
        return fused_distillation_loss(hidden, weight, None, targets, LossConfig(kind="ghost"))[0]

    whole = gradients(total(), hidden, weight)
    mean = gradients(total() / num_labels, hidden, weight)
    for ours, theirs in zip(mean, whole, strict=True):
        assert ours.dtype == torch.bfloat16
        ours, theirs = ours.double().flatten(), theirs.double().flatten()
        factor = torch.dot(ours, theirs) / torch.dot(theirs, theirs)
        assert float(factor) * num_labels == pytest.approx(1.0, abs=3e-4)


def test_hard_equals_torch_cross_entropy():
    hidden, weight, _, targets = inputs(4, torch.float32)
    total, parts = fused_distillation_loss(hidden, weight, None, targets, LossConfig(kind="hard"))
    logits = hidden[targets.positions] @ weight.T
    expected = torch.nn.functional.cross_entropy(logits, targets.token_ids, reduction="none")
    torch.testing.assert_close(total, (expected * targets.weights).sum())
    assert parts["ce"].item() == total.item()
    assert parts["kl"].item() == 0.0


def test_parts_are_weighted_sums_without_alpha_and_temperature():
    hidden, weight, _, targets = inputs(5)
    loss = LossConfig(kind="ghost", alpha=0.25, temperature=2.0)
    total, parts = fused_distillation_loss(hidden, weight, None, targets, loss)
    assert tuple(parts) == METRICS
    assert not any(part.requires_grad for part in parts.values())
    hard = dense_loss(hidden, weight, None, targets, LossConfig(kind="hard"))
    soft = dense_loss(hidden, weight, None, targets, LossConfig(kind="ghost", temperature=2.0))
    assert parts["ce"].item() == pytest.approx(hard.item())
    assert parts["kl"].item() == pytest.approx(soft.item() / 4)
    assert parts["weight"].item() == pytest.approx(targets.weights.sum().item())
    assert total.item() == pytest.approx(0.75 * hard.item() + 0.25 * soft.item())


def test_ghost_pulls_on_ids_off_the_head_and_vanishes_at_the_teacher():
    rng = np.random.default_rng(6)
    targets = random_targets(rng, T, V, T, head_sizes=np.full(T, 5))
    # Logits are the hidden states themselves, so gradients of hidden are those of the logits.
    eye = torch.eye(V, dtype=torch.float64)
    logits = torch.from_numpy(rng.normal(0, 1, (T, V))).requires_grad_()
    total, _ = fused_distillation_loss(logits, eye, None, targets, LossConfig(kind="ghost"))
    (gradient,) = gradients(total, logits)
    ids = targets.entry_ids.long().view(T, 5)
    q = torch.softmax(logits.detach(), 1)
    r = 1 - q.gather(1, ids).sum(1)
    m = targets.tail_logmass.double().exp()
    expected = targets.weights[:, None] * q * (1 - m / r)[:, None]
    off = torch.ones(T, V, dtype=torch.bool).scatter_(1, ids, False)
    torch.testing.assert_close(gradient[off], expected[off])
    assert gradient[off].abs().min() > 0
    torch.testing.assert_close(gradient.sum(1), torch.zeros(T, dtype=torch.float64))

    # A student that puts the teacher's mass on S and any split of m off it has nothing to learn.
    w = targets.entry_logprobs.double().view(T, 5).exp()
    w = w * ((1 - m) / w.sum(1))[:, None]
    spread = torch.from_numpy(rng.uniform(0.1, 1, (T, V))).scatter_(1, ids, 0.0)
    student = (spread * (m / spread.sum(1))[:, None]).scatter_(1, ids, w).log().requires_grad_()
    total, _ = fused_distillation_loss(student, eye, None, targets, LossConfig(kind="ghost"))
    assert abs(total.item()) < 1e-9
    assert gradients(total, student)[0].abs().max() < 1e-9


@pytest.mark.parametrize("kind", ["truncated", "renormalised", "ghost", *DIVERGENCES])
@pytest.mark.parametrize("offset", [-200.0, -60.0, 60.0, 200.0])
def test_extreme_students_and_teachers_stay_finite_and_right(kind, offset):
    """The student all but surely on, or off, the head; teachers with no tail and with all of it."""
    rng = np.random.default_rng(7)
    targets = random_targets(rng, T, V, T, head_sizes=np.full(T, 5))
    tail = targets.tail_logmass.clone()
    tail[:4], tail[4:6] = -torch.inf, -0.0
    targets = replace(targets, tail_logmass=tail)
    logits = torch.from_numpy(rng.normal(0, 1, (T, V)))
    logits.scatter_add_(
        1, targets.entry_ids.long().view(T, 5), torch.full((T, 5), offset, dtype=torch.float64)
    )
    low, high = logits.float().requires_grad_(), logits.requires_grad_()
    loss = LossConfig(kind=kind, alpha=0.5)
    total, _ = fused_distillation_loss(low, torch.eye(V), None, targets, loss)
    if kind == "renormalised":  # the oracle divides by a head mass of zero there
        assert torch.isfinite(gradients(total, low)[0]).all()
        return
    expected = dense_loss(high, torch.eye(V, dtype=torch.float64), None, targets, loss)
    assert total.item() == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(
        gradients(total, low)[0].double(), gradients(expected, high)[0], rtol=1e-3, atol=1e-5
    )


def test_head_of_all_ids_gives_the_full_kl():
    rng = np.random.default_rng(8)
    targets = random_targets(rng, T, V, T, head_sizes=np.full(T, V))
    assert torch.isinf(targets.tail_logmass).all()
    logits = torch.from_numpy(rng.normal(0, 1, (T, V))).requires_grad_()
    eye = torch.eye(V, dtype=torch.float64)
    p = torch.zeros(T, V, dtype=torch.float64).scatter_(
        1, targets.entry_ids.long().view(T, V), targets.entry_logprobs.double().view(T, V).exp()
    )
    p /= p.sum(1, keepdim=True)
    kl = (p * (p.log() - torch.log_softmax(logits, 1))).sum(1) @ targets.weights.double()
    (expected,) = gradients(kl, logits)
    for kind in ("ghost", "truncated", "renormalised"):
        total, _ = fused_distillation_loss(logits, eye, None, targets, LossConfig(kind=kind))
        assert total.item() == pytest.approx(kl.item())
        torch.testing.assert_close(gradients(total, logits)[0], expected)


def test_truncated_may_be_negative_and_is_not_clamped():
    rng = np.random.default_rng(9)
    targets = random_targets(rng, 1, V, 1, head_sizes=np.array([2]))
    logits = torch.zeros(1, V, dtype=torch.float64)
    logits[0, targets.entry_ids.long()] = 10.0
    eye = torch.eye(V, dtype=torch.float64)
    total, parts = fused_distillation_loss(logits, eye, None, targets, LossConfig(kind="truncated"))
    assert total.item() < 0
    assert parts["kl"].item() < 0


def test_loss_gives_gradients_only_where_needed():
    hidden, weight, _, targets = inputs(10, torch.float32)
    full = fused_distillation_loss(hidden, weight, None, targets, LossConfig(kind="ghost"))[0]
    d_hidden, d_weight = gradients(full, hidden, weight)

    frozen = fused_distillation_loss(
        hidden, weight.detach(), None, targets, LossConfig(kind="ghost")
    )[0]
    torch.testing.assert_close(gradients(frozen, hidden)[0], d_hidden)
    head_only = fused_distillation_loss(
        hidden.detach(), weight, None, targets, LossConfig(kind="ghost")
    )[0]
    torch.testing.assert_close(gradients(head_only, weight)[0], d_weight)

    with torch.no_grad():
        silent, _ = fused_distillation_loss(hidden, weight, None, targets, LossConfig(kind="ghost"))
    assert not silent.requires_grad
    torch.testing.assert_close(silent, full.detach())


def count_flops() -> FlopCounterMode:
    """Counts products that add to their result in place as well, which torch leaves out."""

    def addmm_flops(_: object, a: torch.Size, b: torch.Size, **__: object) -> int:
        return 2 * a.numel() * b[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops})


@pytest.mark.parametrize(
    ("needs_gradient", "products"),
    [((), 1), (("hidden",), 2), (("weight",), 2), (("hidden", "weight"), 3)],
)
def test_loss_multiplies_only_for_the_gradients_that_are_needed(needs_gradient, products):
    """Logits take one product of T x H by H x V, and so does each gradient."""
    hidden, weight, _, targets = inputs(11, torch.float32)
    hidden.requires_grad_("hidden" in needs_gradient)
    weight.requires_grad_("weight" in needs_gradient)
    with count_flops() as counter:
        fused_distillation_loss(hidden, weight, None, targets, LossConfig(kind="ghost"))
    assert counter.get_total_flops() == products * 2 * T * H * V


class CountWideResults(TorchDispatchMode):
    """Counts operations with a result as large as all logits."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_wide = isinstance(result, torch.Tensor) and result.numel() >= T * V
        self.count += is_wide and not func.is_view
        return result


def test_loss_without_autograd_makes_no_gradient():
    hidden, weight, _, targets = inputs(11, torch.float32)
    loss, counts = LossConfig(kind="ghost"), []
    for needs_gradient in (True, False):
        with CountWideResults() as wide, torch.set_grad_enabled(needs_gradient):
            fused_distillation_loss(hidden, weight, None, targets, loss)
        counts.append(wide.count)
    assert counts[1] < counts[0]
    with count_flops() as counter, torch.no_grad():
        fused_distillation_loss(hidden, weight, None, targets, loss)
    assert counter.get_total_flops() == 2 * T * H * V


def test_backward_twice_is_an_error():
    hidden, weight, _, targets = inputs(12, torch.float32)
    total, _ = fused_distillation_loss(hidden, weight, None, targets, LossConfig(kind="ghost"))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        total.backward()


def test_no_labels_give_zero_and_zero_gradients():
    hidden, weight, _, targets = inputs(13, torch.float32)
    total, parts = fused_distillation_loss(
        hidden, weight, None, targets.chunk(0, 0), LossConfig(kind="ghost")
    )
    assert total.item() == parts["weight"].item() == 0.0
    total.backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_zero_weight_positions_count_for_nothing():
    hidden, weight, _, targets = inputs(14)
    masked = replace(targets, weights=targets.weights * (torch.arange(T) < 9))
    total, _ = fused_distillation_loss(hidden, weight, None, masked, LossConfig(kind="ghost"))
    alone, _ = fused_distillation_loss(
        hidden, weight, None, targets.chunk(0, 9), LossConfig(kind="ghost")
    )
    assert total.item() == pytest.approx(alone.item())
    torch.testing.assert_close(gradients(total, hidden), gradients(alone, hidden))


def test_loss_refuses_ids_outside_the_head():
    hidden, weight, _, targets = inputs(15)
    with pytest.raises(
        VocabularyError, match=f"id {V - 1} but the student's head has {V - 1} rows"
    ):
        fused_distillation_loss(hidden, weight[:-1], None, targets, LossConfig(kind="ghost"))


def test_loss_refuses_a_temperature_that_is_not_stored():
    hidden, weight, _, targets = inputs(16)
    with pytest.raises(ConfigError, match=r"3\.0 .* serve 0\.5, 1\.0, 2\.0"):
        fused_distillation_loss(
            hidden, weight, None, targets, LossConfig(kind="ghost", temperature=3.0)
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("record", "kind", "temperature", "alpha"), CASES)
def test_gpu_gives_the_same_loss_and_the_same_bits_twice(record, kind, temperature, alpha, dtype):
    """Softmax in place and half-precision products with a float32 result have their own kernels."""
    hidden, weight, _, targets = inputs(2, record=record)
    loss = LossConfig(kind=kind, temperature=temperature, alpha=alpha, chunk_tokens=8)
    low = [x.detach().to("cuda", dtype).requires_grad_() for x in (hidden, weight)]
    high = [x.detach().double().cpu().requires_grad_() for x in low]
    totals = [fused_distillation_loss(*low, None, targets.to("cuda"), loss)[0] for _ in range(2)]
    expected = dense_loss(*high, None, targets, loss)
    assert totals[0].item() == totals[1].item()
    assert totals[0].item() == pytest.approx(expected.item(), rel=1e-4)
    first, second = (gradients(total, *low) for total in totals)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for ours, again, theirs in zip(first, second, gradients(expected, *high), strict=True):
        assert torch.equal(ours, again)
        assert (ours.double().cpu() - theirs).abs().max() < tolerance * theirs.abs().max()
