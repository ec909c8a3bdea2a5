"""How many positions the fused head works off at once: what a memory budget has room for.

A chunk of c positions holds c x V logits, and as much again for every other array of that shape
that its loss needs. So c = budget / (bytes of one position), whatever the length of the sequences.

The budget is never taken from what happens to be free: a run that goes on tomorrow beside another
process would cut other chunks and round differently. Chunks change results within rounding only.
"""

import torch

from trainer.config.train import LossConfig

CPU_BYTES = 1 << 26
"""Budget on a CPU."""

CPU_TOKENS = 512
"""Positions on a CPU at most: 512 were the fastest, or within 3% of it, at vocabularies of 4,096
and 32,768; 4,096 took 16% longer at the smaller one, as the logits leave the caches."""

GPU_SHARE = 1 / 64
"""Chunk of a GPU's whole memory that is the budget there: 1.2 GiB of 80 GB, which is 2,500 bfloat16
positions of a vocabulary of 128k; matrix products stop gaining at about 1,000."""


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
        loss: `chunk_tokens` where it is set; else `head_memory_bytes`, or the device's budget.
        num_labels: positions to work off; chunks are evened out over them, so that the last one is
            not much smaller than the others.
        vocab_size: rows of the head.
        dtype: of the head's weight.
        device: of the head.
        softcap: whether the model bounds its logits.

    Returns:
        At least 1: a budget smaller than one position's logits is exceeded by that one.
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
    """Bytes that a position of a chunk holds in arrays as wide as the vocabulary.

    Logits and gradient share one, in float32 at least; another temperature has a second softmax,
    a soft cap its derivative, and half precision a copy of the gradient for the matrix products,
    which on a CPU are done in float32, from one more copy.
    """
    wide = torch.promote_types(dtype, torch.float32)
    distils = loss.kind != "hard" and loss.alpha > 0.0
    arrays = 1 + int(distils and loss.temperature != 1.0) + int(softcap)
    narrow = 0
    if dtype != wide:
        narrow = dtype.itemsize + (0 if device.type == "cuda" else wide.itemsize)
    return vocab_size * (arrays * wide.itemsize + narrow)


def device_bytes(device: torch.device) -> int:
    """The budget where none is given: the same on every start on the same kind of device."""
    if device.type != "cuda":
        return CPU_BYTES
    return int(torch.cuda.get_device_properties(device).total_memory * GPU_SHARE)
