"""Which ids stand for the rest of a distribution: draws from it, the same on every device.

Probabilities are summed in fixed point (int64, one is 2^50): sums of integers do not depend on the
order in which a device adds, so which ids are drawn depends on the last bits of the logits only
where a draw falls on the boundary of two ids. float32 probabilities need not sum to one exactly;
nothing here relies on it.

Two levels, because a running sum over a whole vocabulary is dear: ids lie in blocks of neighbours,
the running sum goes over the blocks, and only the blocks that a draw falls into are looked into.

Shapes: T positions, V vocabulary, B blocks of D neighbouring ids, P draws of a position at most.
"""

import math
from typing import NamedTuple

import torch

from labeler.topk import ids_of_keys, ordered_topk, sort_keys

ONE = 2**50
"""The probability 1 in fixed point."""

# The running sum takes V / D steps, looking into blocks about 16 D; the sum is least here.
_BLOCKS_LOOKED_INTO = 16
_MIN_DEPTH = 8

_NO_KEY = torch.iinfo(torch.int64).max


class Entries(NamedTuple):
    """The ids that are kept at T positions, head first, then draws.

    Attributes:
        ids: int64 [T, K]; 0 behind the first head_len + tail_len of a row.
        head_len: int64 [T].
        tail_len: int64 [T].
        counts: uint8 [T, K], how often each was drawn; None where each is drawn once.
    """

    ids: torch.Tensor
    head_len: torch.Tensor
    tail_len: torch.Tensor
    counts: torch.Tensor | None = None


def block_depth(vocab_size: int) -> int:
    """D: how many neighbouring ids make a block; a power of two."""
    best = math.sqrt(vocab_size / _BLOCKS_LOOKED_INTO)
    return int(2 ** round(math.log2(max(_MIN_DEPTH, best))))


def fixed_point_buffer(rows: int, vocab_size: int, device: torch.device) -> torch.Tensor:
    """int64 [rows, B, D] for ``FixedPoint``, so large that a row holds the vocabulary."""
    depth = block_depth(vocab_size)
    blocks = -(-vocab_size // depth)
    return torch.zeros(rows, blocks, depth, dtype=torch.int64, device=device)


class FixedPoint:
    """Probabilities of T positions in fixed point, rounded down, and their sums by block."""

    def __init__(self, probs: torch.Tensor, buffer: torch.Tensor) -> None:
        """Takes probabilities, float32 [T, V], which it leaves as they are, and fills a buffer.

        Args:
            probs: not negative. What a row that holds NaN becomes means nothing.
            buffer: of ``fixed_point_buffer``, with at least T rows.
        """
        self._vocab_size = probs.shape[1]
        self._parts = buffer[: len(probs)]
        # Both products are exact, being with powers of two; the other way needs another buffer.
        self._parts.flatten(1)[:, : self._vocab_size].copy_(probs.mul_(float(ONE)))
        probs.mul_(1.0 / ONE)
        self._sums = self._parts.sum(dim=2)

    def threshold(
        self, logits: torch.Tensor, tau: float, uniforms: torch.Tensor, width: int
    ) -> Entries:
        """The ids of at least a probability tau, and systematic draws from the others.

        The most probable id is in the head always. The draws are the ids on which the points
        (u + i) * tau, i = 0, 1, ..., fall along the cumulative sum of the others by rising id.

        Args:
            logits: float32 [T, V], by which the head is ordered.
            tau: in (0, 1).
            uniforms: float64 [T, 1], in [0, 1).
            width: K, more than any row needs.
        """
        unit = round(tau * ONE)
        head, head_len = self._take_head(logits, unit)
        ends = self._sums.cumsum(dim=1)
        first = (uniforms * unit).long()
        num_points = (ends[:, -1:] - first + unit - 1) // unit
        tail_len = num_points.squeeze(1).clamp_(min=0).minimum(width - head_len)
        steps = torch.arange(int(tail_len.max()), device=logits.device)
        points = first + steps * unit
        row, place = (steps < tail_len[:, None]).nonzero(as_tuple=True)
        ids = torch.zeros(len(head), width, dtype=torch.int64, device=logits.device)
        ids[:, : head.shape[1]] = head
        ids[row, head_len[row] + place] = self._ids_at(points, ends, row, place)
        return Entries(ids, head_len, tail_len)

    def sampled(self, uniforms: torch.Tensor, width: int) -> Entries:
        """Independent draws, each distinct id once with its count, by rising id.

        Args:
            uniforms: float64 [T, draws], in [0, 1).
            width: K, at least the number of distinct ids.
        """
        ends = self._sums.cumsum(dim=1)
        total = ends[:, -1:]
        # A product of float64 may be rounded up to the total, which is no id's.
        points = (uniforms * total).long().minimum(total - 1).sort(dim=1).values
        row, place = torch.ones_like(points).nonzero(as_tuple=True)
        drawn = self._ids_at(points, ends, row, place).reshape(points.shape)
        is_new = torch.ones_like(drawn)
        is_new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
        place = is_new.cumsum(dim=1) - 1
        ids = torch.zeros(len(drawn), width, dtype=torch.int64, device=drawn.device)
        place.clamp_(max=width - 1)
        counts = torch.zeros_like(ids).scatter_add_(1, place, torch.ones_like(place))
        tail_len = place[:, -1] + 1
        ids.scatter_(1, place, drawn)
        return Entries(ids, torch.zeros_like(tail_len), tail_len, counts.to(torch.uint8))

    def _take_head(self, logits: torch.Tensor, unit: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of at least ``unit``, int64 [T, most], ordered; takes them out of the sums."""
        # A block that sums to less holds none.
        row, block = (self._sums >= unit).nonzero(as_tuple=True)
        found, place = (self._parts[row, block] >= unit).nonzero(as_tuple=True)
        row, ids = row[found], block[found] * self._parts.shape[2] + place
        counts = torch.bincount(row, minlength=len(logits))
        without = (counts == 0).nonzero().squeeze(1)
        if len(without):
            first, _ = ordered_topk(logits[without], 1)
            row, order = torch.cat((row, without)).sort(stable=True)
            ids = torch.cat((ids, first.squeeze(1)))[order]
            counts[without] = 1
        self._take_out(row, ids)
        starts = counts.cumsum(dim=0) - counts
        place = torch.arange(len(row), device=row.device) - starts[row]
        width = int(counts.max())
        keys = torch.full((len(logits), width), _NO_KEY, device=row.device)
        keys[row, place] = sort_keys(logits[row, ids], ids)
        kept = torch.arange(width, device=row.device) < counts[:, None]
        return ids_of_keys(keys.sort(dim=1).values).masked_fill_(~kept, 0), counts

    def _take_out(self, row: torch.Tensor, ids: torch.Tensor) -> None:
        depth = self._parts.shape[2]
        block = ids // depth
        taken = self._parts[row, block, ids % depth]
        self._parts[row, block, ids % depth] = 0
        self._sums.index_put_((row, block), -taken, accumulate=True)

    def _ids_at(
        self,
        points: torch.Tensor,
        ends: torch.Tensor,
        row: torch.Tensor,
        place: torch.Tensor,
    ) -> torch.Tensor:
        """The ids int64 [n] on which ``points[row, place]`` of the cumulative sums fall.

        Points beyond the end, and those of rows that hold NaN, give ids that mean nothing.
        """
        num_blocks, depth = self._parts.shape[1:]
        block = torch.searchsorted(ends, points, right=True).clamp_(max=num_blocks - 1)[row, place]
        into = points[row, place] - ends[row, block] + self._sums[row, block]
        running = self._parts[row, block].cumsum(dim=1)
        index = (running <= into[:, None]).sum(dim=1).clamp_(max=depth - 1)
        return (block * depth + index).clamp_(max=self._vocab_size - 1)
