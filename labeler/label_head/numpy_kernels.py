"""Kernels that are much faster in numpy than in torch on a CPU.

numpy vectorises where torch does not (selection, argmax, nonzero) or needs fewer passes (dot
products), but uses one thread. It therefore serves where torch has few threads; torch serves
elsewhere and on other devices. Both give the same results.

Shapes: T positions, V vocabulary.
"""

import numpy as np
import torch

# With more threads than this, torch is faster than one thread of numpy.
NUMPY_THREADS = 4


def is_for_numpy(tensor: torch.Tensor) -> bool:
    """Whether numpy is faster for a tensor."""
    return tensor.device.type == "cpu" and torch.get_num_threads() <= NUMPY_THREADS


def dots(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Dot products of the rows of two float32 [T, V]: float32 [T]. May overwrite ``one``."""
    if is_for_numpy(one):
        with np.errstate(invalid="ignore"):  # 0 * inf is NaN, as in torch
            return torch.from_numpy(np.vecdot(one.numpy(), other.numpy()))
    return one.mul_(other).sum(dim=-1)


def top_ids(logits: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """The id of the largest logit of each row, the lowest of equals: int64 [T, 1].

    Args:
        logits: float32 [T, V].
        rows: int64 [n], the rows to look at; None: all.
    """
    if not is_for_numpy(logits):
        chosen = logits if rows is None else logits[rows]
        return chosen.max(dim=1, keepdim=True).indices  # documented to be the first
    if rows is None:
        return torch.from_numpy(logits.numpy().argmax(axis=1, keepdims=True))
    matrix = logits.numpy()  # row by row, because copying wide rows takes longer than the search
    found = np.fromiter((matrix[row].argmax() for row in rows.tolist()), np.int64, len(rows))
    return torch.from_numpy(found[:, None])


def true_positions(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column, int64 [n] each, of the true elements of bool [T, n], in row-major order."""
    if mask.device.type != "cpu":
        rows, columns = mask.nonzero(as_tuple=True)
        return rows, columns
    flat = torch.from_numpy(np.flatnonzero(mask.numpy()))
    rows = flat // mask.shape[1]
    return rows, flat - rows * mask.shape[1]
