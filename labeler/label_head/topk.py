"""The most probable ids, in a deterministic order.

Shapes: T positions, V vocabulary.
"""

import math

import numpy as np
import numpy.typing as npt
import torch

from labeler.label_head.numpy_kernels import is_for_numpy, true_positions

# Smaller blocks do not justify a separate round of selection.
_MIN_BLOCK_DEPTH = 4

# Candidates of a row, as a multiple of k, above which selecting from the full row is faster.
_MOST_EQUALS = 8


def ordered_topk(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row, by falling value and, among equal values, by rising id.

    ``torch.topk`` promises neither which of several equal values it keeps at the boundary nor their
    order, and bfloat16 logits are full of ties. Here the id decides both, because the selection is
    over integers that encode value and id.

    Args:
        logits: float32 [T, V].
        k: at most V.

    Returns:
        The ids, int64 [T, k], and their logits, float32 [T, k].
    """
    depth = _block_depth(logits.shape[1], k + 1)
    if depth < _MIN_BLOCK_DEPTH:
        ids = _topk_exhaustive(logits, k)
        return ids, logits.gather(1, ids)
    if is_for_numpy(logits):
        ids = _topk_above_bound(logits, k, depth)
        return ids, logits.gather(1, ids)
    ids = _topk_by_blocks(logits, k + 1, depth)
    values = logits.gather(1, ids)
    # Blocks are chosen regardless of id, so ties at the boundary may lie in other blocks.
    tied = (values[:, k - 1] == values[:, k]).nonzero().squeeze(1)
    ids, values = ids[:, :k], values[:, :k]
    if len(tied):
        ids[tied] = _lowest_of_equals(logits[tied], ids[tied], values[tied])
    return ids, values


def _lowest_of_equals(
    logits: torch.Tensor, ids: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Replaces the ids of the last value by the lowest ids that have it: ids [T, k].

    In bfloat16 most rows come here, so this reads a row once more without sorting.

    Args:
        logits: float32 [T, V].
        ids: int64 [T, k], of k largest logits, by falling value.
        values: float32 [T, k], their logits.
    """
    last = values[:, -1:]
    is_last = values == last
    rows, equals = true_positions(logits == last)  # by row, then by rising id
    counts = torch.bincount(rows, minlength=len(ids))
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    lowest = equals[place < is_last.sum(dim=1)[rows]]
    return ids.masked_scatter(is_last, lowest)


def _block_depth(vocab_size: int, k: int) -> int:
    """Ids per block; a divisor of the vocabulary if one is close.

    Balances two rounds of selection: vocab_size / depth maxima, then k * depth candidates.
    """
    depth = math.isqrt(vocab_size // k)
    divisors = (d for d in range(max(1, depth), 2 * depth) if vocab_size % d == 0)
    return next(divisors, depth)


def _topk_by_blocks(logits: torch.Tensor, k: int, depth: int) -> torch.Tensor:
    """Ids [T, k] of the largest logits, exact up to ties, for tensors that numpy does not handle.

    The k largest values lie in the k blocks with the largest maxima, so only those are searched. A
    row is read once, with a vectorised maximum.
    """
    vocab_size = logits.shape[1]
    num_blocks = vocab_size // depth
    blocked = num_blocks * depth
    # Block b holds the ids b, b + num_blocks, b + 2 * num_blocks, ...
    by_block = logits[:, :blocked].unflatten(1, (depth, num_blocks))
    blocks = _largest(by_block.amax(dim=1), torch.arange(num_blocks, device=logits.device), k)
    values = by_block.gather(2, blocks[:, None, :].expand(-1, depth, -1)).flatten(1)
    starts = torch.arange(0, blocked, num_blocks, device=logits.device)
    ids = (starts[:, None] + blocks[:, None, :]).flatten(1)
    if blocked < vocab_size:
        rest = torch.arange(blocked, vocab_size, device=logits.device)
        values = torch.cat((values, logits[:, blocked:]), dim=1)
        ids = torch.cat((ids, rest.expand(len(ids), -1)), dim=1)
    return _largest(values, ids, k)


def _topk_above_bound(logits: torch.Tensor, k: int, depth: int) -> torch.Tensor:
    """Ids [T, k] of the largest logits, exact including ties, vectorised in numpy.

    The k-th largest block maximum bounds the k-th largest logit from below. Little more than k ids
    in little more than k blocks reach it, and only these are sorted.
    """
    num_rows, vocab_size = logits.shape
    num_blocks = -(-vocab_size // depth)
    values = logits.contiguous().numpy().reshape(-1)
    maxima = _block_maxima(logits, num_blocks).numpy()
    bound = np.partition(maxima, num_blocks - k, axis=1)[:, num_blocks - k]
    chosen = np.flatnonzero(maxima >= bound[:, None])
    row = chosen // num_blocks
    first = chosen + row * (vocab_size - num_blocks)
    places = first[:, None] + np.arange(0, vocab_size, num_blocks)
    is_above = values.take(places, mode="clip") >= bound[row][:, None]
    if vocab_size % num_blocks:  # the last id of some blocks is past the end, in the next row
        is_above[:, -1] &= places[:, -1] < (row + 1) * vocab_size
    places = places.reshape(-1)[np.flatnonzero(is_above)]
    row = places // vocab_size
    ends = np.searchsorted(row, np.arange(num_rows + 1))
    counts = np.diff(ends)
    # Rows with NaN (which exceeds nothing) or many ties need selection over all ids.
    is_plain = (counts >= k) & (counts <= _MOST_EQUALS * k)
    if not is_plain.all():
        return _topk_by_row_kind(logits, k, depth, is_plain)
    keys = np.full((num_rows, int(counts.max())), np.iinfo(np.int64).max)
    shift = np.arange(num_rows) * keys.shape[1] - ends[:-1]
    keys.reshape(-1)[np.arange(len(row)) + shift[row]] = sort_keys(
        torch.from_numpy(values[places]), torch.from_numpy(places - row * vocab_size)
    ).numpy()
    keys.sort(axis=1)
    return key_ids(torch.from_numpy(keys[:, :k]))


def _topk_by_row_kind(
    logits: torch.Tensor, k: int, depth: int, is_plain: npt.NDArray[np.bool_]
) -> torch.Tensor:
    """Ids [T, k]: of plain rows by their bound, of the others over all their ids."""
    ids = torch.empty(len(logits), k, dtype=torch.int64)
    plain, others = (torch.from_numpy(np.flatnonzero(rows)) for rows in (is_plain, ~is_plain))
    ids[others] = _topk_exhaustive(logits[others], k)
    if len(plain):
        ids[plain] = _topk_above_bound(logits[plain], k, depth)
    return ids


def _block_maxima(logits: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """The largest logit of each block [T, blocks]: ids b, b + blocks, b + 2 * blocks, ..."""
    layers = logits.shape[1] // num_blocks
    maxima = logits[:, : layers * num_blocks].unflatten(1, (layers, num_blocks)).amax(dim=1)
    last = logits[:, layers * num_blocks :]
    if last.shape[1]:
        part = maxima[:, : last.shape[1]]
        torch.maximum(part, last, out=part)
    return maxima


def _topk_exhaustive(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Ids [T, k] of the largest logits over full rows, exact including ties."""
    return _largest(logits, torch.arange(logits.shape[1], device=logits.device), k)


def _largest(values: torch.Tensor, ids: torch.Tensor, k: int) -> torch.Tensor:
    """The ids [T, k] of the largest of float32 values [T, n], falling; ids rise among equals."""
    return key_ids(_smallest(sort_keys(values, ids), k))


def sort_keys(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Integers that rise where float32 values fall and, among equal values, where ids rise.

    Args:
        values: float32, any shape.
        ids: int64 in [0, 2^31), of a shape that broadcasts with it.

    Returns:
        int64; ``key_ids`` recovers the ids.
    """
    bits = (values + 0.0).view(torch.int32)  # -0 becomes 0
    # Read as integers, negative floats sort in reverse: flip their bits below the sign.
    rising = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    return rising.bitwise_not_().long().bitwise_left_shift_(32).bitwise_or_(ids)


def key_ids(keys: torch.Tensor) -> torch.Tensor:
    """The ids of ``sort_keys``, int64. Overwrites the keys."""
    return keys.bitwise_and_(0xFFFFFFFF)


def _smallest(keys: torch.Tensor, k: int) -> torch.Tensor:
    """The k smallest of each row of int64 keys [T, n], rising."""
    if is_for_numpy(keys):
        kept = np.partition(keys.numpy(), min(k, keys.shape[1] - 1), axis=1)[:, :k]
        return torch.from_numpy(np.sort(kept, axis=1))
    return torch.topk(keys, k, dim=-1, largest=False).values
