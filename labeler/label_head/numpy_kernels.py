"""What is done to every row of logits and is much faster in numpy than in torch on a CPU.

numpy uses vector instructions where torch does not (selection, the place of a maximum, what is true
in a mask) or needs fewer passes (dot products), but one thread only. So it serves where torch has a
few threads; elsewhere, and on other devices, torch does.

Shapes: T positions, V vocabulary.
"""

import numpy as np
import torch

# From so many threads on, torch is faster with all of them than numpy with one.
NUMPY_THREADS = 4


def is_for_numpy(tensor: torch.Tensor) -> bool:
    """Whether numpy is the faster one for a tensor."""
    return tensor.device.type == "cpu" and torch.get_num_threads() <= NUMPY_THREADS


def dots(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Dot products of rows, float32 [T], of float32 [T, V] each. May overwrite ``one``."""
    if is_for_numpy(one):
        with np.errstate(invalid="ignore"):  # 0 * inf is NaN, as it is in torch
            return torch.from_numpy(np.vecdot(one.numpy(), other.numpy()))
    return one.mul_(other).sum(dim=-1)


def top_ids(logits: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """The id of the largest of each row of float32 [T, V], the lowest of equals: int64 [T, 1].

    Args:
        logits: float32 [T, V].
        rows: int64 [n], only these; None: all.
    """
    if not is_for_numpy(logits):
        chosen = logits if rows is None else logits[rows]
        return chosen.max(dim=1, keepdim=True).indices  # documented to be the first
    if rows is None:
        return torch.from_numpy(logits.numpy().argmax(axis=1, keepdims=True))
    matrix = logits.numpy()  # one by one, because a copy of wide rows takes longer than the search
    found = np.fromiter((matrix[row].argmax() for row in rows.tolist()), np.int64, len(rows))
    return torch.from_numpy(found[:, None])


def true_positions(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column, int64 [n] each, of what is true in bool [T, n], in order."""
    if mask.device.type != "cpu":
        rows, columns = mask.nonzero(as_tuple=True)
        return rows, columns
    flat = torch.from_numpy(np.flatnonzero(mask.numpy()))
    rows = flat // mask.shape[1]
    return rows, flat - rows * mask.shape[1]
