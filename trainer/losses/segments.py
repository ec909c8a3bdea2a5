"""Segment operations: reduces entries to their position, and spreads positions to their entries.

Entries are stored in CSR layout: position p owns entries ``offsets[p]:offsets[p + 1]``. Segment
reductions read each group in order, so unlike scattered adds they are bitwise reproducible on GPUs.
If all positions have the same number of entries, as in top-k labels, groups are the rows of a
matrix, which is faster.

Shapes: T positions, E cached entries of all of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """The assignment of E entries to T positions.

    Attributes:
        offsets: [T + 1] int64, CSR offsets.
        rows: [E] int64, the position of each entry.
        width: entries of every position if all have the same number, else None.
    """

    offsets: Tensor
    rows: Tensor
    width: int | None

    @classmethod
    def from_offsets(cls, offsets: Tensor, bounds: Tensor) -> "Segments":
        """Groups the entries by CSR offsets.

        Args:
            offsets: [T + 1] int64, starting at 0.
            bounds: the same values on the CPU, which avoids a device sync.
        """
        lengths = bounds.diff()
        num_positions, num_entries = lengths.numel(), int(bounds[-1])
        width = num_entries // num_positions if num_positions else 0
        positions = torch.arange(num_positions, device=offsets.device)
        if bool((lengths == width).all()):
            rows = positions[:, None].expand(-1, width).reshape(-1)
            return cls(offsets, rows, width)
        rows = torch.repeat_interleave(positions, offsets.diff(), output_size=num_entries)
        return cls(offsets, rows, None)

    def spread(self, values: Tensor) -> Tensor:
        """[E], values [T] repeated at the entries of each position."""
        if self.width is not None:
            return values[:, None].expand(-1, self.width).reshape(-1)
        return values.index_select(0, self.rows)

    def sum(self, values: Tensor) -> Tensor:
        """[T], the sum of values [E] over each position's entries; 0 if it has none."""
        if self.width is not None:
            return values.view(-1, self.width).sum(1) if self.width else self._full(values, 0.0)
        return torch.segment_reduce(values, "sum", offsets=self.offsets, initial=0.0, unsafe=True)

    def logsumexp(self, values: Tensor) -> Tensor:
        """[T], log of the sum of exp(values [E]) over a position's entries; -inf if it has none."""
        if self.width == 0:
            return self._full(values, -torch.inf)
        if self.width is not None:
            peak = values.view(-1, self.width).amax(1)
        else:
            lowest = torch.finfo(values.dtype).min
            peak = torch.segment_reduce(
                values, "max", offsets=self.offsets, initial=lowest, unsafe=True
            )
        return peak + self.sum((values - self.spread(peak)).exp_()).log()

    def _full(self, values: Tensor, number: float) -> Tensor:
        return values.new_full((self.offsets.numel() - 1,), number)
