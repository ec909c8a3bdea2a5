"""From full logits to sparse labels: the arithmetic that every teacher shares.

``label_logits`` takes the teacher's logits over the whole vocabulary and keeps what the record
asks for. It is plain torch, runs on any device, and works through its input in slices of rows, so
that its own buffers stay small next to the logits.

Shapes: T positions, V vocabulary, K kept entries, S temperatures.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from schemas.spec import RecordSpec

# Elements of one slice of logits. On a CPU the passes over a slice want to find it in the cache;
# on a GPU fewer, larger kernels are better.
_SLICE_ELEMENTS_CPU = 2**20
_SLICE_ELEMENTS_GPU = 2**27

# Blocks of fewer ids than this are not worth a round of their own.
_MIN_BLOCK_DEPTH = 4

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
    parts = [
        _label_slice(logits[rows].float(), target_ids[rows].long(), record)
        for rows in _slices(logits)
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
    logits: torch.Tensor, target_ids: torch.Tensor, record: RecordSpec
) -> PositionLabels:
    """One slice of float32 logits [T, V]; see ``label_logits``."""
    head_ids, head_logits = ordered_topk(logits, head_width(record, logits.shape[1]))
    probs = torch.softmax(logits, dim=-1)
    top_logit = head_logits[:, :1]
    # log Z = top logit - log p(top): the softmax has already paid for the sum.
    normaliser = top_logit - probs.gather(1, head_ids[:, :1]).log()
    target_logits = logits.gather(1, target_ids[:, None])
    entropy = _entropy(logits, probs, normaliser) if record.entropy else None
    lse = _lse_at(logits, top_logit, head_ids, normaliser, record.temperatures)
    return PositionLabels(
        head_ids=head_ids.int(),
        head_logprobs=(head_logits - normaliser).clamp(max=0.0),
        tail_logmass=_tail_logmass(logits, probs, head_ids, normaliser),
        target_logprob=(target_logits - normaliser).clamp(max=0.0).squeeze(1),
        target_rank=_ranks(logits, target_logits, head_logits),
        entropy=entropy,
        lse=lse,
    )


def ordered_topk(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row, by falling value and, among equal values, by rising id.

    ``torch.topk`` promises no order among equal values, neither which of them it keeps at the
    boundary nor how it sorts them; bfloat16 logits are full of such ties. Here both are decided
    by the id, always.

    Args:
        logits: float32 [T, V].
        k: at most V.

    Returns:
        The ids, int64 [T, k], and their logits, float32 [T, k].
    """
    values, ids = _candidate_topk(logits, min(k + 1, logits.shape[1]))
    tied = values[:, 1:] == values[:, :-1]
    if tied.any():
        at_boundary = tied[:, k - 1 :].any(dim=1).nonzero().squeeze(1)
        inside = tied[:, : k - 1].any(dim=1).nonzero().squeeze(1)
        values, ids = values[:, :k].clone(), ids[:, :k].clone()
        ids[inside] = _sort_ties(values[inside], ids[inside])
        if len(at_boundary):
            exact = _topk_by_key(logits[at_boundary], k)
            ids[at_boundary], values[at_boundary] = exact, logits[at_boundary].gather(1, exact)
    return ids[:, :k], values[:, :k]


def _candidate_topk(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``torch.topk`` in two rounds: ids are dealt into blocks, the best k blocks are searched.

    A value among the k largest always lies in one of the k blocks with the largest maxima, so
    this is exact; it reads the row once with a vector maximum where a selection would branch on
    every element.
    """
    num_rows, vocab_size = logits.shape
    # Balances the two rounds: vocab_size / depth maxima, then k * depth candidates.
    depth = math.isqrt(vocab_size // k)
    if depth < _MIN_BLOCK_DEPTH:
        return torch.topk(logits, k, dim=-1)
    num_blocks = vocab_size // depth
    blocked = num_blocks * depth
    # Block b holds the ids b, b + num_blocks, b + 2 * num_blocks, ...
    maxima = logits[:, :blocked].unflatten(1, (depth, num_blocks)).amax(dim=1)
    blocks = torch.topk(maxima, k, dim=-1, sorted=False).indices
    steps = torch.arange(depth, device=logits.device) * num_blocks
    ids = (blocks[:, :, None] + steps).flatten(1)
    rest = torch.arange(blocked, vocab_size, device=logits.device).expand(num_rows, -1)
    ids = torch.cat((ids, rest), dim=1)
    values, places = torch.topk(logits.gather(1, ids), k, dim=-1)
    return values, ids.gather(1, places)


def _sort_ties(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Ids of rows that are already ordered by value, with equal values put in order of id."""
    keys = (_falling_bits(values) << 32) | ids
    return ids.gather(1, keys.argsort(dim=-1))


def _topk_by_key(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Ids [T, k] of the largest logits, exact for ties too: one integer key holds value and id."""
    ids = torch.arange(logits.shape[1], device=logits.device)
    keys = (_falling_bits(logits) << 32) | ids
    return torch.topk(keys, k, dim=-1, largest=False).values & 0xFFFFFFFF


def _falling_bits(values: torch.Tensor) -> torch.Tensor:
    """int64 in the range of int32 that rises where float32 values fall; 0 and -0 are one value."""
    bits = (values + 0.0).view(torch.int32)
    return torch.where(bits < 0, bits & 0x7FFFFFFF, ~bits).long()


def _entropy(logits: torch.Tensor, probs: torch.Tensor, normaliser: torch.Tensor) -> torch.Tensor:
    """Entropy in nats [T]: log Z - sum of p times logit."""
    mean_logit = torch.linalg.vecdot(probs, logits)
    undefined = mean_logit.isnan().nonzero().squeeze(1)
    if len(undefined):  # An id that the model forbids has 0 * -inf; its share of the entropy is 0.
        allowed = logits[undefined]
        allowed = torch.where(allowed == -torch.inf, 0.0, allowed)
        mean_logit[undefined] = torch.linalg.vecdot(probs[undefined], allowed)
    return (normaliser.squeeze(1) - mean_logit).clamp(min=0.0)


def _tail_logmass(
    logits: torch.Tensor, probs: torch.Tensor, head_ids: torch.Tensor, normaliser: torch.Tensor
) -> torch.Tensor:
    """Log of the probability outside the head [T]; overwrites ``probs``.

    Summed over the tail itself, never 1 - (sum of the head): that loses every digit of a small
    tail.
    """
    tail = probs.scatter_(1, head_ids, 0.0).sum(dim=-1)
    logmass = tail.log()
    small = (tail < _SMALL_TAIL).nonzero().squeeze(1)
    if len(small):
        masked = logits[small].scatter(1, head_ids[small], -torch.inf)
        logmass[small] = torch.logsumexp(masked, dim=-1) - normaliser[small].squeeze(1)
    return logmass.clamp(max=0.0)


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
    top_logit: torch.Tensor,
    head_ids: torch.Tensor,
    normaliser: torch.Tensor,
    temperatures: tuple[float, ...],
) -> torch.Tensor | None:
    """Log sum of p^(1/T) over the vocabulary [T, S]: logsumexp(logit / T) - log Z / T."""
    if not temperatures:
        return None
    columns = []
    for temperature in temperatures:
        probs = torch.softmax(logits / temperature, dim=-1)
        tempered = top_logit / temperature - probs.gather(1, head_ids[:, :1]).log()
        columns.append(tempered - normaliser / temperature)
    return torch.cat(columns, dim=1)
