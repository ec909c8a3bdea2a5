"""Draws that represent the tail of a distribution, the same on every device.

Probabilities are summed in fixed point (int64, one is 2^50): integer sums do not depend on the
order in which a device adds, so the last bits of the logits matter only where a draw falls on the
boundary of two ids. float32 probabilities need not sum to exactly one; nothing here relies on it.

Two levels, because a cumulative sum over the vocabulary is expensive: ids form blocks of
neighbours, the cumulative sum is over blocks, and only blocks that contain a draw are searched.

Shapes: T positions, V vocabulary, B blocks of D neighbouring ids, at most P draws per position.
"""

import math
from typing import NamedTuple

import torch

from labeler.label_head.numpy_kernels import top_ids, true_positions
from labeler.label_head.topk import key_ids, sort_keys

ONE = 2**50
"""The probability 1 in fixed point."""

# The cumulative sum takes V / D steps, searching blocks about 16 D; D minimises their sum.
_BLOCKS_SEARCHED = 16
_MIN_DEPTH = 8

# Probabilities that a CPU thread converts at a time.
_CONVERTED_AT_ONCE_CPU = 2**16

_NO_KEY = torch.iinfo(torch.int64).max


class Entries(NamedTuple):
    """The ids kept at T positions, the head first, then the draws.

    Attributes:
        ids: int64 [T, K]; 0 from slot head_len + tail_len on.
        head_len: int64 [T].
        tail_len: int64 [T].
        counts: uint8 [T, K], how often each was drawn; None if once each.
        tail: float32 [T], total probability outside the head, at the temperature of the draws; None
            without a head.
    """

    ids: torch.Tensor
    head_len: torch.Tensor
    tail_len: torch.Tensor
    counts: torch.Tensor | None = None
    tail: torch.Tensor | None = None


def block_depth(vocab_size: int) -> int:
    """D, the number of neighbouring ids in a block; a power of two."""
    best = math.sqrt(vocab_size / _BLOCKS_SEARCHED)
    return int(2 ** round(math.log2(max(_MIN_DEPTH, best))))


class FixedPointBuffer(NamedTuple):
    """Memory to convert some rows at a time; few on a CPU, to stay in cache.

    Attributes:
        scaled: float32 [rows, V].
        parts: int64 [rows, B, D], zero past the end of the vocabulary.
    """

    scaled: torch.Tensor
    parts: torch.Tensor

    @staticmethod
    def allocate(rows: int, vocab_size: int, device: torch.device) -> "FixedPointBuffer":
        """Memory for at most ``rows`` rows at a time."""
        if device.type == "cpu":
            at_once = _CONVERTED_AT_ONCE_CPU * torch.get_num_threads()
            rows = min(rows, max(1, at_once // vocab_size))
        depth = block_depth(vocab_size)
        blocks = -(-vocab_size // depth)
        return FixedPointBuffer(
            torch.empty(rows, vocab_size, device=device),
            torch.zeros(rows, blocks, depth, dtype=torch.int64, device=device),
        )


class FixedPoint:
    """Block sums of the probabilities of T positions, in fixed point, each id rounded down.

    The probabilities themselves stay unchanged.
    """

    def __init__(self, probs: torch.Tensor, buffer: FixedPointBuffer) -> None:
        """Sums probabilities, float32 [T, V], by block.

        Args:
            probs: not negative. The result of a row that holds NaN is undefined.
            buffer: overwritten.
        """
        self._probs = probs
        at_once, self._num_blocks, self._depth = buffer.parts.shape
        sums = []
        for rows in probs.split(at_once):
            scaled, parts = buffer.scaled[: len(rows)], buffer.parts[: len(rows)]
            torch.mul(rows, float(ONE), out=scaled)  # exact: a power of two
            parts.flatten(1)[:, : probs.shape[1]].copy_(scaled)
            sums.append(parts.sum(dim=2))
        self._sums = torch.cat(sums)

    def threshold(
        self, logits: torch.Tensor, tau: float, uniforms: torch.Tensor, width: int
    ) -> Entries:
        """All ids with probability tau or more, and systematic draws from the others.

        The most probable id is always in the head. The draws are the ids at the points
        (u + i) * tau, i = 0, 1, ..., of the cumulative sum of the others by rising id.

        Args:
            logits: float32 [T, V], by which the head is ordered.
            tau: in (0, 1).
            uniforms: float64 [T, 1], in [0, 1).
            width: K, at least what any row needs.
        """
        unit = round(tau * ONE)
        row, ids = self._find_head(logits, unit)
        head, head_len = _ordered(logits, row, ids)
        taken = self._probs[row, ids]
        self._sums.index_put_((row, ids // self._depth), -_fixed(taken), accumulate=True)
        self._probs[row, ids] = 0.0
        entries = self._systematic(head, head_len, unit, uniforms, width)
        self._probs[row, ids] = taken
        return entries

    def _systematic(
        self,
        head: torch.Tensor,
        head_len: torch.Tensor,
        unit: int,
        uniforms: torch.Tensor,
        width: int,
    ) -> Entries:
        """A head, int64 [T, most], followed by draws from the remaining probabilities."""
        ends = self._sums.cumsum(dim=1)
        first = (uniforms * unit).long()
        num_points = (ends[:, -1:] - first + unit - 1) // unit
        tail_len = num_points.squeeze(1).clamp_(min=0).minimum(width - head_len)
        steps = torch.arange(int(tail_len.max()), device=head.device)
        points = first + steps * unit
        row, place = true_positions(steps < tail_len[:, None])
        ids = torch.zeros(len(head), width, dtype=torch.int64, device=head.device)
        ids[:, : head.shape[1]] = head
        ids[row, head_len[row] + place] = self._ids_at(points, ends, row, place)
        return Entries(ids, head_len, tail_len, tail=ends[:, -1].double().div_(ONE).float())

    def sampled(self, uniforms: torch.Tensor, width: int) -> Entries:
        """Independent draws: each distinct id once, with its count, by rising id.

        Args:
            uniforms: float64 [T, draws], in [0, 1).
            width: K, at least the number of distinct ids.
        """
        ends = self._sums.cumsum(dim=1)
        total = ends[:, -1:]
        # In float64 the product may round up to the total, which lies past the last id.
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

    def _find_head(self, logits: torch.Tensor, unit: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows, rising, and ids, int64 [n] each: probabilities >= ``unit``, else the top id."""
        # A block with a smaller sum cannot contain one.
        row, block = true_positions(self._sums >= unit)
        found, place = true_positions(self._blocks(row, block) >= unit)
        row, ids = row[found], block[found] * self._depth + place
        is_without = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        is_without[row] = False
        without = is_without.nonzero().squeeze(1)
        if not len(without):
            return row, ids
        first = top_ids(logits, without).squeeze(1)
        row, order = torch.cat((row, without)).sort(stable=True)
        return row, torch.cat((ids, first))[order]

    def _blocks(self, row: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        """Probabilities in blocks, int64 [n, D], in fixed point; 0 past the vocabulary."""
        vocab_size = self._probs.shape[1]
        if vocab_size % self._depth == 0:
            blocks = self._probs.view(-1, self._depth)
            return _fixed(blocks.index_select(0, row * self._num_blocks + block))
        ids = block[:, None] * self._depth + torch.arange(self._depth, device=block.device)
        probs = self._probs[row[:, None], ids.clamp(max=vocab_size - 1)]
        return _fixed(probs.masked_fill_(ids >= vocab_size, 0.0))

    def _ids_at(
        self,
        points: torch.Tensor,
        ends: torch.Tensor,
        row: torch.Tensor,
        place: torch.Tensor,
    ) -> torch.Tensor:
        """The ids, int64 [n], at ``points[row, place]`` of the cumulative sums.

        For points past the end, and in rows that hold NaN, the ids are undefined.
        """
        block = torch.searchsorted(ends, points, right=True)
        block = block.clamp_(max=self._num_blocks - 1)[row, place]
        into = points[row, place] - ends[row, block] + self._sums[row, block]
        running = self._blocks(row, block).cumsum(dim=1)
        index = (running <= into[:, None]).sum(dim=1).clamp_(max=self._depth - 1)
        return (block * self._depth + index).clamp_(max=self._probs.shape[1] - 1)


def _fixed(probs: torch.Tensor) -> torch.Tensor:
    """Fixed point, int64, rounded down as in the sums."""
    return (probs * float(ONE)).long()


def _ordered(
    logits: torch.Tensor, row: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of rows, rising, as a matrix in the order of a head, and how many each row has.

    Returns:
        int64 [T, most], 0 past the end; int64 [T].
    """
    counts = torch.bincount(row, minlength=len(logits))
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(dim=0) - counts)[row]
    slots = torch.arange(int(counts.max()), device=row.device)
    keys = torch.full((len(logits), len(slots)), _NO_KEY, device=row.device)
    keys[row, place] = sort_keys(logits[row, ids], ids)
    kept = slots < counts[:, None]
    return key_ids(keys.sort(dim=1).values).masked_fill_(~kept, 0), counts
