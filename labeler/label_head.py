"""From full logits to sparse labels: the arithmetic that every teacher shares.

``label_logits`` takes the teacher's logits over the whole vocabulary and keeps what the record
asks for. It is plain torch, runs on any device, and works through its input in slices of rows, so
that its own buffers stay small next to the logits.

Shapes: T positions, V vocabulary, K kept entries, S temperatures.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from schemas.spec import RecordSpec

# Elements of one slice of logits. On a CPU the passes over a slice want to find it in the cache;
# on a GPU fewer, larger kernels are better.
_SLICE_ELEMENTS_CPU = 2**20
_SLICE_ELEMENTS_GPU = 2**27

# Blocks of fewer ids than this are not worth a round of their own.
_MIN_BLOCK_DEPTH = 4

# numpy selects with vector instructions, several times faster than torch but on one thread only.
_NUMPY_THREADS = 4

# Below this tail probability, terms of the softmax have begun to underflow in float32.
_SMALL_TAIL = 1e-30


class PositionLabels(NamedTuple):
    """What is kept of the teacher's distribution at T positions, before rounding.

    Row i describes the distribution that row i of the logits is: the one **over** the target token,
    computed from the tokens before it. Log-probabilities are natural, at temperature 1.

    Attributes:
        head_ids: int32 [T, K], the most probable ids by falling probability, ties by rising id.
        head_logprobs: float32 [T, K], their log-probabilities; -inf where the model forbids an id.
        tail_logmass: float32 [T], log of the probability outside the head; -inf where nothing is.
        target_logprob: float32 [T], of the token that stands in the sequence.
        target_rank: int32 [T], 1 + the number of ids strictly more probable.
        entropy: float32 [T], of the full distribution, in nats; None if the record has none.
        lse: float32 [T, S], log sum over the vocabulary of p^(1/T) for each temperature of the
            record; None if it has none.
    """

    head_ids: torch.Tensor
    head_logprobs: torch.Tensor
    tail_logmass: torch.Tensor
    target_logprob: torch.Tensor
    target_rank: torch.Tensor
    entropy: torch.Tensor | None
    lse: torch.Tensor | None


def head_width(record: RecordSpec, vocab_size: int) -> int:
    """How many entries a head has: ``record.k``, or the whole vocabulary where that is smaller."""
    return min(record.k, vocab_size)


def label_logits(
    logits: torch.Tensor, target_ids: torch.Tensor, record: RecordSpec
) -> PositionLabels:
    """Labels T positions from their full logits.

    Args:
        logits: floating [T, V], what the model's softmax gets: after soft cap, scale and bias,
            without the padding of the head. Computed on in float32.
        target_ids: integer [T], the token that stands at each target position.
        record: which columns to compute, and how many entries to keep.

    Returns:
        The labels, on the device of the logits. A NaN among a row's logits makes that row's
        labels NaN.
    """
    if len(logits) == 0:
        return _empty(logits, record)
    slices = list(_slices(logits))
    # One buffer for all slices: fresh memory of this size costs more than what is done in it.
    buffer = torch.empty(slices[0].stop, logits.shape[1], device=logits.device)
    parts = [
        _label_slice(logits[rows].float(), target_ids[rows].long(), record, buffer)
        for rows in slices
    ]
    if len(parts) == 1:
        return parts[0]
    return PositionLabels(*(_cat(columns) for columns in zip(*parts, strict=True)))


def _slices(logits: torch.Tensor) -> Iterator[slice]:
    num_rows, vocab_size = logits.shape
    elements = _SLICE_ELEMENTS_CPU if logits.device.type == "cpu" else _SLICE_ELEMENTS_GPU
    step = max(1, elements // vocab_size)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def _cat(columns: tuple[torch.Tensor | None, ...]) -> torch.Tensor | None:
    present = [column for column in columns if column is not None]
    return torch.cat(present) if present else None


def _empty(logits: torch.Tensor, record: RecordSpec) -> PositionLabels:
    width = head_width(record, logits.shape[1])

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(0, *shape, dtype=dtype, device=logits.device)

    return PositionLabels(
        head_ids=zeros(width, dtype=torch.int32),
        head_logprobs=zeros(width),
        tail_logmass=zeros(),
        target_logprob=zeros(),
        target_rank=zeros(dtype=torch.int32),
        entropy=zeros() if record.entropy else None,
        lse=zeros(len(record.temperatures)) if record.temperatures else None,
    )


def _label_slice(
    logits: torch.Tensor, target_ids: torch.Tensor, record: RecordSpec, buffer: torch.Tensor
) -> PositionLabels:
    """One slice of float32 logits [T, V]; see ``label_logits``. ``buffer`` is overwritten."""
    head_ids, head_logits = ordered_topk(logits, head_width(record, logits.shape[1]))
    probs = torch.softmax(logits, dim=-1, out=buffer[: len(logits)])
    head_probs = probs.gather(1, head_ids)
    # log Z = top logit - log p(top): the softmax has already paid for the sum.
    normaliser = head_logits[:, :1] - head_probs[:, :1].log()
    target_logits = logits.gather(1, target_ids[:, None])
    tail_probs = probs.scatter_(1, head_ids, 0.0)
    tail_logmass = _tail_logmass(logits, tail_probs, head_ids, normaliser)
    entropy = None
    if record.entropy:
        entropy = _entropy(logits, tail_probs, head_logits, head_probs, normaliser)
    return PositionLabels(
        head_ids=head_ids.int(),
        head_logprobs=(head_logits - normaliser).clamp_(max=0.0),
        tail_logmass=tail_logmass,
        target_logprob=(target_logits - normaliser).clamp_(max=0.0).squeeze(1),
        target_rank=_ranks(logits, target_logits, head_logits),
        entropy=entropy,
        lse=_lse_at(logits, head_logits, head_ids, normaliser, record.temperatures, buffer),
    )


def ordered_topk(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row, by falling value and, among equal values, by rising id.

    ``torch.topk`` promises no order among equal values, neither which of them it keeps at the
    boundary nor how it sorts them; bfloat16 logits are full of such ties. Here both are decided
    by the id, always, because what is selected are integers that hold value and id.

    Args:
        logits: float32 [T, V].
        k: at most V.

    Returns:
        The ids, int64 [T, k], and their logits, float32 [T, k].
    """
    depth = _block_depth(logits.shape[1], k + 1)
    if depth < _MIN_BLOCK_DEPTH:
        ids = _topk_of_all(logits, k)
        return ids, logits.gather(1, ids)
    ids = _topk_of_blocks(logits, k + 1, depth)
    values = logits.gather(1, ids)
    # Which blocks were searched is not decided by id, so equals at the boundary may be in others.
    tied = (values[:, k - 1] == values[:, k]).nonzero().squeeze(1)
    ids, values = ids[:, :k], values[:, :k]
    if len(tied):
        ids[tied] = _topk_of_all(logits[tied], k)
    return ids, values


def _block_depth(vocab_size: int, k: int) -> int:
    """How many ids a block has; a divisor of the vocabulary where there is one close by.

    Balances two rounds of selection: vocab_size / depth maxima, then k * depth candidates.
    """
    depth = math.isqrt(vocab_size // k)
    divisors = (d for d in range(max(1, depth), 2 * depth) if vocab_size % d == 0)
    return next(divisors, depth)


def _topk_of_blocks(logits: torch.Tensor, k: int, depth: int) -> torch.Tensor:
    """Ids [T, k] of the largest logits: ids are dealt into blocks, the best k are searched.

    A value among the k largest lies in one of the k blocks with the largest maxima, so this is
    exact, up to ties; it reads a row once, with a vector maximum.
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


def _topk_of_all(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Ids [T, k] of the largest logits, exact for ties too."""
    return _largest(logits, torch.arange(logits.shape[1], device=logits.device), k)


def _largest(values: torch.Tensor, ids: torch.Tensor, k: int) -> torch.Tensor:
    """The ids [T, k] of the largest of float32 values [T, n], falling; ids rise among equals."""
    bits = (values + 0.0).view(torch.int32)  # Makes one value of 0 and -0.
    # As integers, the bits of negative floats fall where the floats rise: turn those around.
    rising = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    keys = rising.bitwise_not_().long().bitwise_left_shift_(32).bitwise_or_(ids)
    return _smallest(keys, k).bitwise_and_(0xFFFFFFFF)


def _smallest(keys: torch.Tensor, k: int) -> torch.Tensor:
    """The k smallest of each row of int64 keys [T, n], rising."""
    if keys.device.type == "cpu" and torch.get_num_threads() <= _NUMPY_THREADS:
        kept = np.partition(keys.numpy(), min(k, keys.shape[1] - 1), axis=1)[:, :k]
        return torch.from_numpy(np.sort(kept, axis=1))
    return torch.topk(keys, k, dim=-1, largest=False).values


def _tail_logmass(
    logits: torch.Tensor, tail_probs: torch.Tensor, head_ids: torch.Tensor, normaliser: torch.Tensor
) -> torch.Tensor:
    """Log of the probability outside the head [T].

    Summed over the tail itself, never 1 - (sum of the head): that loses every digit of a small
    tail. ``tail_probs`` [T, V] are zero at the head.
    """
    tail = tail_probs.sum(dim=-1)
    logmass = tail.log()
    small = (tail < _SMALL_TAIL).nonzero().squeeze(1)
    if len(small):
        masked = logits[small].scatter(1, head_ids[small], -torch.inf)
        logmass[small] = torch.logsumexp(masked, dim=-1) - normaliser[small].squeeze(1)
    return logmass.clamp_(max=0.0)


def _entropy(
    logits: torch.Tensor,
    tail_probs: torch.Tensor,
    head_logits: torch.Tensor,
    head_probs: torch.Tensor,
    normaliser: torch.Tensor,
) -> torch.Tensor:
    """Entropy in nats [T]: log Z - sum of p times logit. Overwrites ``tail_probs``."""
    mean_logit = tail_probs.mul_(logits).sum(dim=-1)
    mean_logit += (head_probs * head_logits).sum(dim=-1)
    undefined = mean_logit.isnan().nonzero().squeeze(1)
    if len(undefined):  # An id that the model forbids has 0 * -inf; its share of the entropy is 0.
        allowed = logits[undefined]
        probs = torch.softmax(allowed, dim=-1)
        allowed = torch.where(allowed == -torch.inf, 0.0, allowed)
        mean_logit[undefined] = torch.linalg.vecdot(probs, allowed)
    return (normaliser.squeeze(1) - mean_logit).clamp_(min=0.0)


def _ranks(
    logits: torch.Tensor, target_logits: torch.Tensor, head_logits: torch.Tensor
) -> torch.Tensor:
    """1 + the number of strictly larger logits, int32 [T]."""
    ranks = (head_logits > target_logits).sum(dim=-1, dtype=torch.int32)
    # Where the target is below the head, what is above it is not all in the head: count the row.
    below = (target_logits < head_logits[:, -1:]).squeeze(1).nonzero().squeeze(1)
    if len(below):
        larger = torch.empty(len(below), logits.shape[1], device=logits.device)
        torch.gt(logits[below], target_logits[below], out=larger)
        ranks[below] = larger.sum(dim=-1).int()
    return ranks + 1


def _lse_at(
    logits: torch.Tensor,
    head_logits: torch.Tensor,
    head_ids: torch.Tensor,
    normaliser: torch.Tensor,
    temperatures: tuple[float, ...],
    buffer: torch.Tensor,
) -> torch.Tensor | None:
    """Log sum of p^(1/T) over the vocabulary [T, S]: logsumexp(logit / T) - log Z / T."""
    if not temperatures:
        return None
    columns = []
    for temperature in temperatures:
        probs = torch.softmax(logits / temperature, dim=-1, out=buffer[: len(logits)])
        tempered = head_logits[:, :1] / temperature - probs.gather(1, head_ids[:, :1]).log()
        columns.append(tempered - normaliser / temperature)
    return torch.cat(columns, dim=1)
