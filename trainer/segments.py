"""Sums over ragged groups of cached entries.

Entries are stored in CSR style: the entries of position p are `offsets[p]:offsets[p + 1]`. Segment
reductions read each group in order, so they give the same bits on every run, on GPUs too, where
scattered adds do not.
"""

import torch
from torch import Tensor


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sums the entries of every position.

    Args:
        values: [E] floating point, entries.
        offsets: [T + 1] int64, on the device of `values`.

    Returns:
        [T], in the dtype of `values`; 0 where a position has no entries.
    """
    if not values.numel():
        return values.new_zeros(offsets.numel() - 1)
    return torch.segment_reduce(values, "sum", offsets=offsets, initial=0.0, unsafe=True)


def segment_logsumexp(values: Tensor, offsets: Tensor, rows: Tensor) -> Tensor:
    """Log of the summed exponentials of the entries of every position.

    Args:
        values: [E] floating point, entries, nats.
        offsets: [T + 1] int64, on the device of `values`.
        rows: [E] int64, the position of each entry.

    Returns:
        [T], nats; -inf where a position has no entries.
    """
    if not values.numel():
        return values.new_full((offsets.numel() - 1,), -torch.inf)
    lowest = torch.finfo(values.dtype).min
    peak = torch.segment_reduce(values, "max", offsets=offsets, initial=lowest, unsafe=True)
    return peak + segment_sum((values - peak[rows]).exp_(), offsets).log()
