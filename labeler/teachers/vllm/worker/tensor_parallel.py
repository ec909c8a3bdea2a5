"""Labels under tensor parallelism, where each worker has the logits of a part of the vocabulary.

If the logits were gathered, every worker would hold those of all positions and compute the same
labels. Instead, an all-to-all gives each of G workers the full vocabulary for its share of the
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

from labeler.teachers.vllm.packed_labels import Packed

# The only compute_logits that can be applied to a part of the vocabulary, without its white space:
# one that does nothing but call the logits processor.
_PLAIN = re.compile(
    r"\)->torch\.Tensor(?:\|None)?:logits=self\.logits_processor"
    r"\(self\.([a-z_.]+),hidden_states\)returnlogits$"
)


@dataclass(frozen=True)
class VocabParallelLogits:
    """A model's logits, divided among G workers by vocabulary; all of them make the same calls.

    Attributes:
        local_logits: this worker's part of the logits of hidden states [T, H], floating [T, V / G
            or a little more]; concatenated by rank, the parts are the vocabulary and then padding.
        group: the ``torch.distributed`` group of the workers.
    """

    local_logits: Callable[[torch.Tensor], torch.Tensor]
    group: Any

    def exchange(self, hidden: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, slice]:
        """The logits [share, V] of this worker's share of hidden states [T, H], and the share."""
        shard = self.local_logits(hidden)
        ranks, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        bounds = rank_bounds(len(shard), ranks)
        mine = slice(int(bounds[rank]), int(bounds[rank + 1]))
        logits = exchange_shards(shard, ranks, self.group)
        return logits[: mine.stop - mine.start, :vocab_size], mine

    def gather(
        self, packed: Packed, audits: torch.Tensor | None, audited: np.ndarray
    ) -> tuple[Packed, torch.Tensor | None]:
        """The labels and audits of all T positions, in order, from those of each share.

        Args:
            packed: labels of this worker's share.
            audits: audits in this share; None if no position of any share is audited.
            audited: bool [T].
        """
        bounds = rank_bounds(len(audited), dist.get_world_size(self.group))
        lengths = np.diff(bounds).tolist()
        packed = Packed(*(_all_gather_rows(part, lengths, self.group) for part in packed))
        if audits is None:
            return packed, None
        counts = [int(audited[start:end].sum()) for start, end in pairwise(bounds)]
        return packed, _all_gather_rows(audits, counts, self.group)


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
    """The output head of a model that does not modify its logits; None if it might."""
    try:
        source = inspect.getsource(type(model).compute_logits)
        forward = inspect.signature(model.logits_processor.forward).parameters
    except (OSError, TypeError, AttributeError):
        return None
    found = _PLAIN.search("".join(source.split()))
    return attrgetter(found[1])(model) if found and "skip_gather" in forward else None
