"""Chooses how many positions the fused head processes at once, from a memory budget.

A chunk of c positions needs c x V logits and possibly more arrays of that shape, so
c = budget / (bytes of one position), independent of the sequence length.

The budget never depends on free memory: a run resumed beside another process would then use other
chunks and round differently. The chunk size changes results only within rounding.
"""

import torch

from trainer.config.train import LossConfig

CPU_BYTES = 1 << 26
"""Budget on a CPU."""

CPU_TOKENS = 512
"""Maximum on a CPU. 512 was the fastest, or within 3% of it, at vocabularies of 4,096 and 32,768;
4,096 positions took 16% longer at the smaller one, because the logits exceed the caches."""

GPU_SHARE = 1 / 64
"""Budget on a GPU as a share of its total memory: 1.2 GiB of 80 GB, enough for 2,500 bfloat16
positions at a vocabulary of 128k. Matrix products stop getting faster at about 1,000."""


def chunk_tokens(
    loss: LossConfig,
    num_labels: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
    softcap: bool,
) -> int:
    """Positions of every chunk but the last.

    Args:
        loss: ``chunk_tokens`` decides if set; else the budget is ``head_memory_bytes`` or the
            device's.
        num_labels: positions to process, split into chunks of nearly equal size.
        vocab_size: rows of the head.
        dtype: of the head's weight.
        device: of the head.
        softcap: whether the model bounds its logits.

    Returns:
        At least 1, even if one position exceeds the budget.
    """
    if loss.chunk_tokens is not None:
        return loss.chunk_tokens
    budget = loss.head_memory_bytes or device_bytes(device)
    most = max(1, budget // bytes_per_position(loss, vocab_size, dtype, device, softcap))
    if device.type == "cpu":
        most = min(most, CPU_TOKENS)
    num_chunks = max(1, -(-num_labels // most))
    return max(1, -(-num_labels // num_chunks))


def bytes_per_position(
    loss: LossConfig, vocab_size: int, dtype: torch.dtype, device: torch.device, softcap: bool
) -> int:
    """Bytes of all arrays [V] that a position of a chunk needs.

    Logits and gradient share one array, at least float32. A temperature other than 1 adds a second
    softmax, a soft cap adds its derivative, and half precision adds a copy of the gradient for the
    matrix products, which on a CPU run in float32 from one more copy.
    """
    wide = torch.promote_types(dtype, torch.float32)
    distils = loss.kind != "hard" and loss.alpha > 0.0
    arrays = 1 + int(distils and loss.temperature != 1.0) + int(softcap)
    narrow = 0
    if dtype != wide:
        narrow = dtype.itemsize + (0 if device.type == "cuda" else wide.itemsize)
    return vocab_size * (arrays * wide.itemsize + narrow)


def device_bytes(device: torch.device) -> int:
    """The default budget; depends only on the device model."""
    if device.type != "cuda":
        return CPU_BYTES
    return int(torch.cuda.get_device_properties(device).total_memory * GPU_SHARE)
