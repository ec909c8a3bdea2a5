"""Softmax of a chunk's rows, and its product with one factor per row, in torch or Triton.

The fused head's only operations over the full vocabulary: a log-sum-exp, and, once the gradients at
the labels are known, softmax * factor in place of the logits.

torch makes about eight passes over the logits (two for maxima, about three for the softmax, two for
the product). The kernels of `trainer.head.triton_softmax` make three: one read for the log-sum-exp,
one read and one write for the product.

Shapes: T rows of a chunk, V vocabulary.
"""

from typing import Protocol

import torch
from torch import Tensor

from schemas.errors import ConfigError
from trainer.config.train import LossConfig


class RowSoftmax(Protocol):
    """Softmax of logits [T, V] with contiguous rows; overwrites the logits.

    Attributes:
        lse: [T], log-sum-exp of the rows.
    """

    lse: Tensor

    def __init__(self, logits: Tensor) -> None: ...

    def times_(self, factor: Tensor) -> None:
        """Overwrites the logits with softmax * factor [T]; may be called once."""
        ...


class TorchSoftmax:
    """`RowSoftmax` in torch, on every device and in every precision."""

    def __init__(self, logits: Tensor) -> None:
        # lse = peak - log softmax(peak) avoids a second pass of exponentials.
        peak = logits.amax(1)
        self._softmax = torch.softmax(logits, 1, out=logits)
        self.lse = peak - self._softmax.amax(1).log()

    def times_(self, factor: Tensor) -> None:
        """See `RowSoftmax.times_`."""
        self._softmax.mul_(factor[:, None])


def row_softmax(loss: LossConfig, logits: Tensor) -> type[RowSoftmax]:
    """The implementation that ``loss.kernel`` selects for these logits.

    Raises:
        ConfigError: it is "triton", but Triton is not installed or the logits are not float32 on a
            GPU.
    """
    if loss.kernel == "torch":
        return TorchSoftmax
    try:
        from trainer.head import triton_softmax
    except ImportError as error:
        raise ConfigError(
            f'loss.kernel = "triton" needs Triton ({error}); it comes with PyTorch for CUDA: '
            "`pip install triton`, or remove loss.kernel"
        ) from error
    if logits.dtype != torch.float32 or not (logits.is_cuda or triton_softmax.INTERPRETED):
        raise ConfigError(
            f'loss.kernel = "triton" needs float32 logits on a GPU, but these are {logits.dtype} '
            f"on {logits.device.type}; remove loss.kernel"
        )
    return triton_softmax.TritonSoftmax
