"""The Triton kernels, in Triton's interpreter on the CPU, against the dense float64 oracle.

The interpreter has to be asked for before Triton is first imported, so the checks run in a process
of their own: this module is also its program.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from schemas.errors import ConfigError
from schemas.spec import RecordSpec
from tests.support import ROOT
from tests.support.distillation_oracle import dense_loss, drawn_targets, random_targets
from trainer.config.train import LossConfig
from trainer.head.fused_head import LogitTransform, fused_distillation_loss

L, H, T, SEED = 14, 8, 9, 30
VOCABULARIES = (40, 5000)
"""Less than a program looks at at once, and a few times as much with a rest."""

LOSSES = [
    LossConfig(kind=kind, temperature=temperature, alpha=alpha, chunk_tokens=4)
    for kind, temperature, alpha in [
        ("hard", 1.0, 1.0),
        ("ghost", 1.0, 1.0),
        ("ghost", 1.0, 0.3),
        ("ghost", 2.0, 0.3),
        ("truncated", 1.0, 1.0),
        ("renormalised", 2.0, 1.0),
        ("forward_kl", 1.0, 1.0),
        ("forward_kl", 2.0, 0.3),
        ("reverse_kl", 1.0, 0.3),
        ("jsd", 2.0, 1.0),
        ("skew_kl", 1.0, 1.0),
        ("tvd", 1.0, 0.3),
    ]
]


def inputs(loss: LossConfig, vocab_size: int):
    rng = np.random.default_rng(SEED)
    if loss.kind == "forward_kl":
        record = RecordSpec(kind="threshold", tau=0.1, temperatures=(2.0,))
        targets = drawn_targets(rng, record, T, vocab_size, L)
    else:
        targets = random_targets(rng, T, vocab_size, L, (2.0,), np.full(T, 7))
    hidden = torch.from_numpy(rng.normal(0, 1, (L, H)))
    weight = torch.from_numpy(rng.normal(0, 1, (vocab_size, H)))
    return hidden, weight, targets


def check_against_the_oracle(loss: LossConfig, vocab_size: int) -> None:
    hidden, weight, targets = inputs(loss, vocab_size)
    low = [x.float().requires_grad_() for x in (hidden, weight)]
    high = [x.detach().double().requires_grad_() for x in low]
    transform = LogitTransform(scale=0.7, softcap=4.0)
    expected = dense_loss(*high, None, targets, loss, transform)
    theirs = torch.autograd.grad(expected, high)
    kernels = loss.model_copy(update={"kernel": "triton"})
    total, _ = fused_distillation_loss(*low, None, targets, kernels, transform)
    assert total.item() == pytest.approx(expected.item(), rel=1e-4), loss
    for one, other in zip(torch.autograd.grad(total, low), theirs, strict=True):
        scale = float(other.abs().max())
        assert float((one.double() - other).abs().max()) < 1e-5 * scale + 1e-6, loss
    with torch.no_grad():
        silent, _ = fused_distillation_loss(*low, None, targets, kernels, transform)
    assert silent.item() == total.item()  # the same bits again


def check_extremes() -> None:
    """A row of one logit each way, rows at the ends of float32, and NaN, which must not be lost."""
    from trainer.head.triton_softmax import TritonSoftmax

    rows = torch.randn(6, 4100, generator=torch.Generator().manual_seed(SEED)) * 50
    rows[1] = torch.finfo(torch.float32).min  # what a row is whose every id is a cached one
    rows[2] = 3e38
    rows[3, 17] = 1e4
    rows[4, 4099] = float("nan")
    found = rows.clone()
    softmax = TritonSoftmax(found)
    lse = softmax.lse
    expected = torch.logsumexp(rows.double(), 1)
    assert torch.isnan(lse[4])
    keep = [0, 1, 2, 3, 5]
    torch.testing.assert_close(lse[keep].double(), expected[keep], rtol=1e-6, atol=1e-5)
    factor = torch.tensor([1.0, 0.0, 2.0, -1.0, 1.0, 0.5])
    softmax.times_(factor)
    wanted = torch.softmax(rows.double(), 1) * factor.double()[:, None]
    torch.testing.assert_close(found[keep].double(), wanted[keep], rtol=1e-5, atol=1e-12)
    assert torch.isnan(found[4]).all()
    assert not found[1].any()
    TritonSoftmax(rows[:0]).times_(factor[:0])


def main() -> None:
    for loss in LOSSES:
        check_against_the_oracle(loss, VOCABULARIES[0])
    for loss in LOSSES[1:4]:
        check_against_the_oracle(loss, VOCABULARIES[1])
    check_extremes()
    print("checked")


def test_kernels_equal_the_oracle_in_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, __file__],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checked" in done.stdout


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus_that_are_not_here(capability):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from trainer.head import triton_softmax

    for kernel, third in ((triton_softmax._sums, "total"), (triton_softmax._times, "factor")):
        signature = dict.fromkeys(("logits", "peak", third), "*fp32")
        signature |= {"num_ids": "i32", "stride": "i32", "LANES": "constexpr"}
        source = ASTSource(kernel, signature, {"LANES": triton_softmax.LANES})
        target = GPUTarget("cuda", capability, 32)
        assert "cubin" in triton.compile(source, target=target, options={"num_warps": 8}).asm


def test_kernels_are_refused_where_they_cannot_run():
    loss = LOSSES[1].model_copy(update={"kernel": "triton"})
    hidden, weight, targets = inputs(loss, VOCABULARIES[0])
    with pytest.raises(ConfigError, match=r'loss\.kernel = "triton".*remove loss\.kernel'):
        fused_distillation_loss(hidden, weight, None, targets, loss)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.kind)
def test_kernels_equal_torch_on_a_gpu(loss):
    hidden, weight, targets = inputs(loss, VOCABULARIES[1])
    results = []
    for kernel in ("torch", "triton"):
        leaves = [x.float().cuda().requires_grad_() for x in (hidden, weight)]
        chosen = loss.model_copy(update={"kernel": kernel})
        total, _ = fused_distillation_loss(*leaves, None, targets.to("cuda"), chosen)
        results.append((total.detach(), *torch.autograd.grad(total, leaves)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    main()
