"""A chunk of the fused head takes the memory that it was given; results stay the same."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.support.distillation_oracle import random_targets
from trainer.config.train import LossConfig
from trainer.head.chunk_size import CPU_BYTES, bytes_per_position, chunk_tokens
from trainer.head.fused_head import LogitTransform, fused_distillation_loss

V, H, T = 3000, 16, 300
BUDGETS = (1 << 20, 1 << 22)
CPU = torch.device("cpu")


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, H, generator=generator).to(dtype).requires_grad_()
    return hidden, torch.randn(V, H, generator=generator).to(dtype).requires_grad_()


def labels():
    rng = np.random.default_rng(0)
    return random_targets(rng, T, V, T, (2.0,), head_sizes=np.full(T, 12))


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that torch held on the CPU at once during the call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    held = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_chunk_takes_what_the_budget_allows(dtype, temperature, softcap):
    hidden, weight = inputs(dtype)
    targets, transform = labels(), LogitTransform(1.0, softcap)
    peaks, chunks = [], []
    for budget in BUDGETS:
        loss = LossConfig(
            kind="ghost", alpha=0.5, temperature=temperature, head_memory_bytes=budget
        )
        run = partial(fused_distillation_loss, hidden, weight, None, targets, loss, transform)
        peaks.append(peak_bytes(run))
        chunks.append(chunk_tokens(loss, T, V, dtype, CPU, softcap is not None))
    # What does not grow with chunks (gradients, casts of the weight) cancels; 8%: the entries.
    position = bytes_per_position(loss, V, dtype, CPU, softcap is not None)
    expected = (chunks[1] - chunks[0]) * position
    assert expected <= BUDGETS[1]
    assert expected <= peaks[1] - peaks[0] <= 1.08 * expected


def test_loss_does_not_depend_on_the_budget_beyond_rounding():
    hidden, weight = inputs(torch.float32)
    targets = labels().chunk(0, 40)
    found = []
    for chunk in (
        {"head_memory_bytes": 1},
        {"head_memory_bytes": 1 << 18},
        {"chunk_tokens": 7},
        {},
    ):
        total, _ = fused_distillation_loss(
            hidden, weight, None, targets, LossConfig(kind="ghost", alpha=0.7, **chunk)
        )
        found.append((total.detach(), *torch.autograd.grad(total, (hidden, weight))))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (LossConfig(chunk_tokens=5), 5),
        (LossConfig(head_memory_bytes=1), 1),  # never less than one position
        (LossConfig(head_memory_bytes=100 * 4000), 100),
        (LossConfig(head_memory_bytes=700 * 4000), 500),  # two even chunks, not 700 and 300
        (LossConfig(kind="ghost", temperature=2.0, head_memory_bytes=100 * 4000), 50),
        (LossConfig(), 500),  # on a CPU, more at once are no faster
    ],
)
def test_size_of_a_chunk(loss, expected):
    assert chunk_tokens(loss, 1000, 1000, torch.float32, CPU, False) == expected


def test_default_memory_grows_with_the_vocabulary_up_to_a_limit_and_not_with_the_rows():
    rng = np.random.default_rng(0)
    targets = random_targets(rng, 2048, 256, 2048, head_sizes=np.full(2048, 2))

    def peak(length: int, vocab_size: int) -> int:
        hidden, weight = torch.zeros(length, 1), torch.zeros(vocab_size, 1)
        few, loss = targets.chunk(0, length), LossConfig(kind="truncated")
        return peak_bytes(partial(fused_distillation_loss, hidden, weight, None, few, loss))

    small = peak(1024, 1 << 12)
    assert peak(2048, 1 << 12) == pytest.approx(small, rel=0.1)
    assert peak(1024, 1 << 13) == pytest.approx(2 * small, rel=0.1)
    assert 0.9 * CPU_BYTES < peak(1024, 1 << 16) < 1.1 * CPU_BYTES


def test_chunk_of_no_positions_has_one():
    assert chunk_tokens(LossConfig(), 0, 1 << 15, torch.float32, CPU, False) == 1


def test_config_refuses_two_chunk_sizes():
    with pytest.raises(ValueError, match="remove one of them"):
        LossConfig(chunk_tokens=5, head_memory_bytes=1 << 20)
