"""Turns full logits into sparse labels; shared by all teachers.

``label_logits`` takes the teacher's logits over the full vocabulary and keeps what the record
requests. It runs on any device and processes its input in slices of rows, so that its own buffers
stay small compared to the logits.

Shapes: T positions, V vocabulary, K kept entries at most, H of them in a head, S temperatures.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from labeler.label_head.buffers import SliceBuffers
from labeler.label_head.draws import ONE, Entries, FixedPoint, FixedPointBuffer
from labeler.label_head.labels import Labels
from labeler.label_head.numpy_kernels import dots, top_ids
from labeler.label_head.thread_pool import SlicePool
from labeler.label_head.topk import ordered_topk
from schemas.spec import RecordSpec

# Elements of one slice of logits. On a CPU a slice should fit in the cache; on a GPU fewer, larger
# kernels are better.
_SLICE_ELEMENTS_CPU = 2**20
_SLICE_ELEMENTS_GPU = 2**27
_SLICES_PER_THREAD = 2

# Below this tail probability, terms of the softmax begin to underflow in float32.
_SMALL_TAIL = 1e-30

# Below this tail probability, the rounding of fixed point over a large vocabulary may show.
_INEXACT_TAIL = 1e-4


@dataclass(frozen=True)
class PositionLabels(Labels[torch.Tensor]):
    """Labels of the T rows of a batch of logits, on their device; ``entry_counts`` is uint8."""


class _Head(NamedTuple):
    """The heads of T positions.

    Attributes:
        ids: int64 [T, H]; past the end of a head, its first id again.
        logits: float32 [T, H], of those ids.
        kept: bool [T, H], which slots are in a head; None if all are.
        last: float32 [T, 1], the lowest logit in each head.
    """

    ids: torch.Tensor
    logits: torch.Tensor
    kept: torch.Tensor | None
    last: torch.Tensor


class _Tops(NamedTuple):
    """The most probable ids of T positions.

    Attributes:
        ids: int64 [T, 1].
        probs: float32 [T, 1] by temperature other than 1, its probability where already known.
    """

    ids: torch.Tensor
    probs: dict[float, torch.Tensor]


def label_logits(
    logits: torch.Tensor,
    target_ids: torch.Tensor,
    record: RecordSpec,
    uniforms: np.ndarray | None = None,
    pool: SlicePool | None = None,
) -> PositionLabels:
    """Labels T positions from their full logits.

    Args:
        logits: floating [T, V], the input of the model's softmax: after soft cap, scale and bias,
            without the padding of the head. Computed on in float32.
        target_ids: integer [T], the token at each target position.
        record: which columns to compute, and which entries to keep.
        uniforms: float64 [T, numbers per position], see ``row_uniforms``; None for kinds without
            draws.
        pool: shares the slices among CPU threads and keeps their memory for later calls; None: one
            slice after the other, in memory of this call.

    Returns:
        The labels, on the device of the logits. A NaN in a row of logits makes its labels NaN.
    """
    if len(logits) == 0:
        # Label one dummy row and drop it: every column then has its shape and dtype.
        numbers = None if uniforms is None else np.zeros((1, uniforms.shape[1]))
        zeros = logits.new_zeros(1, logits.shape[1])
        one = label_logits(zeros, target_ids.new_zeros(1), record, numbers)
        return PositionLabels(*(None if c is None else c[:0] for c in one.columns()))
    numbers = None if uniforms is None else torch.from_numpy(uniforms).to(logits.device)

    def label(rows: slice, buffers: SliceBuffers) -> PositionLabels:
        buffers.fit(rows.stop - rows.start, logits, record)
        return _label_slice(
            buffers.in_float32(logits[rows]),
            target_ids[rows].long(),
            record,
            None if numbers is None else numbers[rows],
            buffers,
        )

    if pool is None:
        buffers = SliceBuffers()
        return concatenate([label(rows, buffers) for rows in row_slices(logits, 1)])
    return concatenate(pool.map(label, list(row_slices(logits, pool.num_threads))))


def concatenate(parts: Sequence[PositionLabels]) -> PositionLabels:
    """The labels of all parts, in order; at least one."""
    if len(parts) == 1:
        return parts[0]
    columns = zip(*(part.columns() for part in parts), strict=True)
    return PositionLabels(*(None if column[0] is None else torch.cat(column) for column in columns))


def row_slices(logits: torch.Tensor, num_threads: int) -> Iterator[slice]:
    """The rows of logits [T, V] that a thread works on at a time."""
    num_rows, vocab_size = logits.shape
    elements = _SLICE_ELEMENTS_CPU if logits.device.type == "cpu" else _SLICE_ELEMENTS_GPU
    step = max(1, elements // vocab_size)
    if num_threads > 1:  # several per thread, so that other threads can take over from a busy core
        step = max(1, min(step, num_rows // (_SLICES_PER_THREAD * num_threads)))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def _label_slice(
    logits: torch.Tensor,
    target_ids: torch.Tensor,
    record: RecordSpec,
    uniforms: torch.Tensor | None,
    buffers: SliceBuffers,
) -> PositionLabels:
    """One slice of float32 logits [T, V]; see ``label_logits``. The buffers are overwritten."""
    assert buffers.probs is not None
    probs = buffers.probs[: len(logits)]
    entries, tops = _select(logits, record, uniforms, probs, buffers.fixed)
    # log Z = top logit - log p(top), which reuses the sum of the softmax.
    normaliser = logits.gather(1, tops.ids) - probs.gather(1, tops.ids).log()
    target_logits = logits.gather(1, target_ids[:, None])
    head = None if record.kind == "sampled" else _head(logits, entries, record)
    head_probs = None
    if head is None:
        tail_logmass = torch.zeros(len(logits), device=logits.device)
    elif entries.tail is not None and record.drawn_at == 1.0:
        tail_logmass = _known_tail_logmass(entries.tail, logits, probs, head.ids, normaliser)
    else:
        head_probs = _take_head(probs, head)
        tail_logmass = _tail_logmass(logits, probs, head.ids, normaliser)
    # The probabilities are no longer needed; their buffer is reused below.
    entropy = _entropy(logits, probs, head, head_probs, normaliser) if record.entropy else None
    lse = _lse_at(logits, tops, normaliser, record.temperatures, probs)
    return PositionLabels(
        entry_ids=entries.ids.int(),
        entry_logprobs=_entry_logprobs(logits, entries, normaliser, record),
        head_len=entries.head_len.int(),
        tail_len=entries.tail_len.int(),
        entry_counts=entries.counts,
        tail_logmass=tail_logmass,
        target_logprob=(target_logits - normaliser).clamp_(max=0.0).squeeze(1),
        target_rank=_ranks(logits, target_logits, head, probs),
        entropy=entropy,
        lse=lse,
    )


def _select(
    logits: torch.Tensor,
    record: RecordSpec,
    uniforms: torch.Tensor | None,
    probs: torch.Tensor,
    buffer: FixedPointBuffer | None,
) -> tuple[Entries, _Tops]:
    """Selects the ids to keep. Leaves the probabilities at temperature 1 in ``probs``."""
    width = record.most_entries(logits.shape[1])
    if not record.has_draws:
        ids, _ = ordered_topk(logits, width)
        torch.softmax(logits, dim=-1, out=probs)
        head_len = torch.full((len(ids),), width, device=ids.device)
        if record.kind == "topp":
            head_len = _covering(probs.gather(1, ids), record.top_p)
            slots = torch.arange(width, device=ids.device)
            ids.masked_fill_(slots >= head_len[:, None], 0)
        return Entries(ids, head_len, torch.zeros_like(head_len)), _Tops(ids[:, :1], {})
    assert uniforms is not None, "a record with draws needs uniform numbers"
    assert buffer is not None
    drawn_at = record.drawn_at
    torch.softmax(logits if drawn_at == 1.0 else logits / drawn_at, dim=-1, out=probs)
    fixed = FixedPoint(probs, buffer)
    if record.kind == "threshold":
        entries = fixed.threshold(logits, record.tau, uniforms, width)
        first_ids = entries.ids[:, :1]
    else:
        entries = fixed.sampled(uniforms, width)
        first_ids = top_ids(logits)
    if drawn_at == 1.0:
        return entries, _Tops(first_ids, {})
    tops = _Tops(first_ids, {drawn_at: probs.gather(1, first_ids)})
    torch.softmax(logits, dim=-1, out=probs)
    return entries, tops


def _covering(falling: torch.Tensor, mass: float) -> torch.Tensor:
    """How many of falling probabilities [T, K] reach a mass, or all that are not 0: int64 [T].

    Summed in fixed point, so that the result does not depend on the order of the additions.
    """
    before = (falling * float(ONE)).long()
    before = before.cumsum(dim=1) - before
    needed = (before < round(mass * ONE)) & (falling > 0.0)
    return needed.sum(dim=1).clamp_(min=1)


def _head(logits: torch.Tensor, entries: Entries, record: RecordSpec) -> _Head:
    if record.kind == "topk":
        kept_logits = logits.gather(1, entries.ids)
        return _Head(entries.ids, kept_logits, None, kept_logits[:, -1:])
    slots = torch.arange(int(entries.head_len.max()), device=logits.device)
    kept = slots < entries.head_len[:, None]
    ids = torch.where(kept, entries.ids[:, : len(slots)], entries.ids[:, :1])
    kept_logits = logits.gather(1, ids)
    return _Head(ids, kept_logits, kept, kept_logits.gather(1, entries.head_len[:, None] - 1))


def _take_head(probs: torch.Tensor, head: _Head) -> torch.Tensor:
    """Probabilities of the head [T, H], 0 past its end. Sets them to 0 in ``probs``."""
    head_probs = probs.gather(1, head.ids)
    probs.scatter_(1, head.ids, 0.0)
    return head_probs if head.kept is None else head_probs.masked_fill_(~head.kept, 0.0)


def _entry_logprobs(
    logits: torch.Tensor, entries: Entries, normaliser: torch.Tensor, record: RecordSpec
) -> torch.Tensor:
    logprobs = (logits.gather(1, entries.ids) - normaliser).clamp_(max=0.0)
    if record.kind == "topk":
        return logprobs
    slots = torch.arange(logprobs.shape[1], device=logits.device)
    used = slots < (entries.head_len + entries.tail_len)[:, None]
    return logprobs.masked_fill_(~used, 0.0)


def _tail_logmass(
    logits: torch.Tensor, tail_probs: torch.Tensor, head_ids: torch.Tensor, normaliser: torch.Tensor
) -> torch.Tensor:
    """Log of the probability outside the head [T].

    Summed over the tail itself, because 1 - (sum of the head) loses every digit of a small tail.
    ``tail_probs`` [T, V] are zero at the head.
    """
    tail = tail_probs.sum(dim=-1)
    logmass = tail.log()
    small = (tail < _SMALL_TAIL).nonzero().squeeze(1)
    if len(small):
        masked = logits[small].scatter(1, head_ids[small], -torch.inf)
        logmass[small] = torch.logsumexp(masked, dim=-1) - normaliser[small].squeeze(1)
    return logmass.clamp_(max=0.0)


def _known_tail_logmass(
    tail: torch.Tensor,
    logits: torch.Tensor,
    probs: torch.Tensor,
    head_ids: torch.Tensor,
    normaliser: torch.Tensor,
) -> torch.Tensor:
    """The same from the tail [T] that the draws have summed in fixed point. Keeps ``probs``."""
    logmass = torch.where(normaliser.squeeze(1).isnan(), torch.nan, tail.log().clamp_(max=0.0))
    small = (tail < _INEXACT_TAIL).nonzero().squeeze(1)
    if len(small):
        ids = head_ids[small]
        rest = probs[small].scatter_(1, ids, 0.0)
        logmass[small] = _tail_logmass(logits[small], rest, ids, normaliser[small])
    return logmass


def _entropy(
    logits: torch.Tensor,
    tail_probs: torch.Tensor,
    head: _Head | None,
    head_probs: torch.Tensor | None,
    normaliser: torch.Tensor,
) -> torch.Tensor:
    """Entropy in nats [T]: log Z - sum of p times logit. May overwrite ``tail_probs``.

    Without ``head_probs``, ``tail_probs`` are the probabilities of all ids.
    """
    mean_logit = dots(tail_probs, logits)
    if head is not None and head_probs is not None:
        mean_logit += (head_probs * head.logits).sum(dim=-1)
    undefined = mean_logit.isnan().nonzero().squeeze(1)
    if len(undefined):  # A forbidden id has 0 * -inf; its contribution is 0.
        allowed = logits[undefined]
        probs = torch.softmax(allowed, dim=-1)
        allowed = torch.where(allowed == -torch.inf, 0.0, allowed)
        mean_logit[undefined] = torch.linalg.vecdot(probs, allowed)
    return (normaliser.squeeze(1) - mean_logit).clamp_(min=0.0)


def _ranks(
    logits: torch.Tensor, target_logits: torch.Tensor, head: _Head | None, buffer: torch.Tensor
) -> torch.Tensor:
    """1 + the number of strictly larger logits, int32 [T]. Overwrites ``buffer``, [T, V]."""
    if head is None:
        return torch.gt(logits, target_logits, out=buffer).sum(dim=-1).int() + 1
    larger = head.logits > target_logits
    if head.kept is not None:
        larger &= head.kept
    ranks = larger.sum(dim=-1, dtype=torch.int32)
    # If the target is below the head, ids above it may lie outside: count the full row.
    below = (target_logits < head.last).squeeze(1).nonzero().squeeze(1)
    if len(below):
        rows = torch.index_select(logits, 0, below, out=buffer[: len(below)])
        ranks[below] = rows.gt_(target_logits[below]).sum(dim=-1).int()
    return ranks + 1


def _lse_at(
    logits: torch.Tensor,
    tops: _Tops,
    normaliser: torch.Tensor,
    temperatures: tuple[float, ...],
    buffer: torch.Tensor,
) -> torch.Tensor | None:
    """Log sum of p^(1/T) over the vocabulary [T, S]: logsumexp(logit / T) - log Z / T."""
    if not temperatures:
        return None
    top_logits = logits.gather(1, tops.ids)
    columns = []
    for temperature in temperatures:
        top = tops.probs.get(temperature)
        if top is None:
            probs = torch.softmax(logits / temperature, dim=-1, out=buffer)
            top = probs.gather(1, tops.ids)
        columns.append((top_logits - normaliser) / temperature - top.log())
    return torch.cat(columns, dim=1)
