"""Python values between the ranks of a run."""

from typing import Any

import torch.distributed as dist


def gathered(items: list[Any], group: Any = None) -> list[Any]:
    """The items of all ranks, on all ranks, in the order of the ranks."""
    per_rank: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(per_rank, items, group=group)
    return [item for part in per_rank for item in part]


def from_rank_0(value: Any) -> Any:
    """Rank 0's value on all ranks."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def share(items: list[Any]) -> list[Any]:
    """This rank's part of a list that all ranks hold."""
    return items[dist.get_rank() :: dist.get_world_size()]
