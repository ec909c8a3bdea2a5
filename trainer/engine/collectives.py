"""Exchanges Python values between ranks."""

from typing import Any

import torch.distributed as dist


def gathered(items: list[Any], group: Any = None) -> list[Any]:
    """Returns the items of all ranks, in rank order. Collective."""
    per_rank: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(per_rank, items, group=group)
    return [item for part in per_rank for item in part]


def from_rank_0(value: Any) -> Any:
    """Returns rank 0's value on every rank. Collective."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def share(items: list[Any]) -> list[Any]:
    """Returns this rank's part of a list that every rank holds."""
    return items[dist.get_rank() :: dist.get_world_size()]
