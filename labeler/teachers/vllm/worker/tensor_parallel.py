"""Labels under tensor parallelism, where each worker has the logits of a part of the vocabulary.

If the logits were gathered, every worker would get those of all positions and make the same labels
of them. Instead, an all-to-all gives each of G workers the full vocabulary for its share of the
positions: a G-th of the traffic, memory and work. Each labels its share as a single worker would,
so that every kind of record is served and labels are the same; only labels are gathered.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from labeler.label_head.audit_logits import audit_logits
from labeler.label_head.position_labels import PositionLabels, label_logits
from labeler.label_head.thread_pool import SlicePool
from labeler.teachers.vllm.packed_labels import Packed, pack
from schemas.spec import RecordSpec

# The only compute_logits that can be applied to a part of the vocabulary, without its white space:
# one that does nothing but call the logits processor.
_PLAIN = re.compile(
    r"\)->torch\.Tensor(?:\|None)?:logits=self\.logits_processor"
    r"\(self\.([a-z_.]+),hidden_states\)returnlogits$"
)


@dataclass(frozen=True)
class VocabParallelLogits:
    """A model's logits, divided among workers by vocabulary.

    Attributes:
        local_logits: this worker's part of the logits of hidden states [T, H].
        group: the ``torch.distributed`` group of the workers.
    """

    local_logits: Callable[[torch.Tensor], torch.Tensor]
    group: Any


def label_vocab_parallel(
    shard: torch.Tensor,
    target_ids: torch.Tensor,
    uniforms: np.ndarray | None,
    audited: np.ndarray,
    record: RecordSpec,
    vocab_size: int,
    group: Any,
    pool: SlicePool,
) -> tuple[Packed, torch.Tensor | None]:
    """Labels T positions together with the other workers of a group; every worker calls it.

    Args:
        shard: floating [T, V / G or a little more], this worker's logits; concatenated by rank,
            shards are the vocabulary followed by padding.
        target_ids: integer [T], the same in each worker, like everything below.
        uniforms: float64 [T, numbers per position], or None for kinds without draws.
        audited: bool [T], which positions are audited.
        record: what to keep.
        vocab_size: V.
        group: a ``torch.distributed`` group of G workers.
        pool: the threads of this worker.

    Returns:
        The labels of all T positions, and the audits in order; None if nothing is audited.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    logits = exchange_shards(shard, ranks, group)[:, :vocab_size]
    bounds = rank_bounds(len(shard), ranks)
    mine = slice(int(bounds[rank]), int(bounds[rank + 1]))
    logits = logits[: mine.stop - mine.start]
    numbers = None if uniforms is None else uniforms[mine]
    labels = label_logits(logits, target_ids[mine], record, numbers, pool)
    lengths = np.diff(bounds).tolist()
    packed = Packed(*(_all_gather_rows(column, lengths, group) for column in pack(labels, record)))
    if not audited.any():
        return packed, None
    at = torch.from_numpy(np.flatnonzero(audited[mine])).to(logits.device)
    counts = [int(audited[start:end].sum()) for start, end in pairwise(bounds)]
    return packed, _all_gather_rows(audit_rows(logits, labels, at, pool), counts, group)


def audit_rows(
    logits: torch.Tensor, labels: PositionLabels, at: torch.Tensor, pool: SlicePool
) -> torch.Tensor:
    """Audits of some rows of logits, in order; see ``audit_logits``.

    Args:
        logits: [T, V].
        labels: of these.
        at: int64 [A], the rows.
        pool: shares the work among CPU threads.
    """

    def audit(part: slice, _: object) -> torch.Tensor:
        rows = at[part]
        return audit_logits(logits[rows], labels.entry_ids[rows], labels.head_len[rows])

    step = max(1, -(-len(at) // pool.num_threads))
    parts = [slice(first, first + step) for first in range(0, max(len(at), 1), step)]
    return torch.cat(pool.map(audit, parts))


def rank_bounds(count: int, ranks: int) -> np.ndarray:
    """Bounds of each rank's share of T positions: int64 [G + 1]."""
    return np.minimum(np.arange(ranks + 1) * -(-count // ranks), count)


def exchange_shards(shard: torch.Tensor, ranks: int, group: Any) -> torch.Tensor:
    """All-to-all from a part of the vocabulary of all rows to the full rows of this rank.

    Args:
        shard: [T, W]; W is the same on every rank.
        ranks: G.
        group: of the G ranks.

    Returns:
        [ceil(T / G), G * W]; rows past the end of T are zeros.
    """
    share, width = -(-len(shard) // ranks), shard.shape[1]
    sent = shard.new_zeros(ranks * share, width)
    sent[: len(shard)] = shard
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.view(ranks, share, width).transpose(0, 1).reshape(share, ranks * width)


def _all_gather_rows(column: torch.Tensor, lengths: list[int], group: Any) -> torch.Tensor:
    """The rows of all ranks, concatenated; rank g has ``lengths[g]`` of them."""
    longest = max(lengths)  # all_gather needs equal shapes
    padded = column.new_zeros(longest, *column.shape[1:])
    padded[: len(column)] = column
    everything = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(everything, padded, group=group)
    return torch.cat([part[:length] for part, length in zip(everything, lengths, strict=True)])


def vocab_parallel_logits(model: Any) -> VocabParallelLogits | None:
    """How to get a worker's part of the logits from a vLLM model.

    Returns:
        None for one worker, or if the model computes its logits in an unknown way; they are
        gathered then.
    """
    head, processor = _plain_head(model), getattr(model, "logits_processor", None)
    if head is None or processor is None or getattr(head, "tp_size", 1) < 2:
        return None
    from vllm.distributed import get_tp_group

    return VocabParallelLogits(
        lambda hidden: processor(head, hidden, skip_gather=True), get_tp_group().device_group
    )


def _plain_head(model: Any) -> Any:
    """The output head of a model that does nothing else to its logits; None if it may."""
    try:
        source = inspect.getsource(type(model).compute_logits)
        forward = inspect.signature(model.logits_processor.forward).parameters
    except (OSError, TypeError, AttributeError):
        return None
    found = _PLAIN.search("".join(source.split()))
    return attrgetter(found[1])(model) if found and "skip_gather" in forward else None
