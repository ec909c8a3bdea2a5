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

from labeler.label_head.numpy_kernels import top_ids, true_positions
from labeler.label_head.topk import key_ids, sort_keys

ONE = 2**50
"""The probability 1 in fixed point."""

# The running sum takes V / D steps, looking into blocks about 16 D; the sum is least here.
_BLOCKS_LOOKED_INTO = 16
_MIN_DEPTH = 8

# Probabilities that a thread of a CPU converts together.
_CONVERTED_AT_ONCE_CPU = 2**16

_NO_KEY = torch.iinfo(torch.int64).max


class Entries(NamedTuple):
    """The ids that are kept at T positions, head first, then draws.

    Attributes:
        ids: int64 [T, K]; 0 behind the first head_len + tail_len of a row.
        head_len: int64 [T].
        tail_len: int64 [T].
        counts: uint8 [T, K], how often each was drawn; None where each is drawn once.
        tail: float32 [T], the sum of all probabilities outside the head, at the temperature of the
            draws; None where there is no head.
    """

    ids: torch.Tensor
    head_len: torch.Tensor
    tail_len: torch.Tensor
    counts: torch.Tensor | None = None
    tail: torch.Tensor | None = None


def block_depth(vocab_size: int) -> int:
    """D: how many neighbouring ids make a block; a power of two."""
    best = math.sqrt(vocab_size / _BLOCKS_LOOKED_INTO)
    return int(2 ** round(math.log2(max(_MIN_DEPTH, best))))


class FixedPointBuffer(NamedTuple):
    """Memory to convert some rows at a time: few on a CPU, so that they stay in its cache.

    Attributes:
        scaled: float32 [rows, V].
        parts: int64 [rows, B, D], zero behind the vocabulary.
    """

    scaled: torch.Tensor
    parts: torch.Tensor

    @staticmethod
    def of(rows: int, vocab_size: int, device: torch.device) -> "FixedPointBuffer":
        """For up to ``rows`` rows at a time; fewer are as good."""
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
    """Sums of probabilities of T positions by block, in fixed point, rounded down id by id.

    The probabilities themselves stay where they are, as they are.
    """

    def __init__(self, probs: torch.Tensor, buffer: FixedPointBuffer) -> None:
        """Sums up probabilities, float32 [T, V].

        Args:
            probs: not negative. What a row that holds NaN becomes means nothing.
            buffer: overwritten.
        """
        self._probs = probs
        at_once, self._num_blocks, self._depth = buffer.parts.shape
        sums = []
        for rows in probs.split(at_once):
            scaled, parts = buffer.scaled[: len(rows)], buffer.parts[: len(rows)]
            torch.mul(rows, float(ONE), out=scaled)  # Exact, being with a power of two.
            parts.flatten(1)[:, : probs.shape[1]].copy_(scaled)
            sums.append(parts.sum(dim=2))
        self._sums = torch.cat(sums)

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
        """A head, int64 [T, most], and the draws from what is left."""
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

    def _find_head(self, logits: torch.Tensor, unit: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows, rising, and ids, int64 [n] each, of what is at least ``unit``, or of the top id."""
        # A block that sums to less holds none.
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
        """Probabilities of blocks, int64 [n, D], in fixed point; 0 behind the vocabulary."""
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
        """The ids int64 [n] on which ``points[row, place]`` of the cumulative sums fall.

        Points beyond the end, and those of rows that hold NaN, give ids that mean nothing.
        """
        block = torch.searchsorted(ends, points, right=True)
        block = block.clamp_(max=self._num_blocks - 1)[row, place]
        into = points[row, place] - ends[row, block] + self._sums[row, block]
        running = self._blocks(row, block).cumsum(dim=1)
        index = (running <= into[:, None]).sum(dim=1).clamp_(max=self._depth - 1)
        return (block * self._depth + index).clamp_(max=self._probs.shape[1] - 1)


def _fixed(probs: torch.Tensor) -> torch.Tensor:
    """int64, rounded down, as the sums have them."""
    return (probs * float(ONE)).long()


def _ordered(
    logits: torch.Tensor, row: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of rows, rising, as a matrix in the order of a head; and how many each row has.

    Returns:
        int64 [T, most], 0 behind the end; int64 [T].
    """
    counts = torch.bincount(row, minlength=len(logits))
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(dim=0) - counts)[row]
    slots = torch.arange(int(counts.max()), device=row.device)
    keys = torch.full((len(logits), len(slots)), _NO_KEY, device=row.device)
    keys[row, place] = sort_keys(logits[row, ids], ids)
    kept = slots < counts[:, None]
    return key_ids(keys.sort(dim=1).values).masked_fill_(~kept, 0), counts
