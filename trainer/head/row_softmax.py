"""The softmax of a chunk's rows, and its product with one number a row: by torch, or by Triton.

The fused head needs no more than that of the whole width of the vocabulary: a log-sum-exp, and
later, once the few numbers of the labels are worked out, softmax * factor in the logits' place.

torch walks over the logits about eight times (two maxima, a softmax of three or so, a product of
two); the kernels of `trainer.head.triton_softmax` three times: one read for the log-sum-exp, one
read and one write for the product.
"""

from typing import Protocol

import torch
from torch import Tensor

from schemas.errors import ConfigError
from trainer.config.train import LossConfig


class RowSoftmax(Protocol):
    """The softmax of logits [T, V], each row contiguous, which from now on belong to it.

    Attributes:
        lse: [T], log-sum-exp of the rows.
    """

    lse: Tensor

    def __init__(self, logits: Tensor) -> None: ...

    def times_(self, factor: Tensor) -> None:
        """Leaves softmax * factor [T] in the logits. Once."""
        ...


class TorchSoftmax:
    """Everywhere, and in float64 too. See `RowSoftmax`."""

    def __init__(self, logits: Tensor) -> None:
        """The log-sum-exp is read off the softmax at the row's peak, which saves a second pass of
        exponentials over the row."""
        peak = logits.amax(1)
        self._softmax = torch.softmax(logits, 1, out=logits)
        self.lse = peak - self._softmax.amax(1).log()

    def times_(self, factor: Tensor) -> None:
        """In place."""
        self._softmax.mul_(factor[:, None])


def row_softmax(loss: LossConfig, logits: Tensor) -> type[RowSoftmax]:
    """The implementation that ``loss.kernel`` names.

    Raises:
        ConfigError: it is Triton's, and these logits are not float32 on a GPU, or there is no
            Triton.
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
            f'loss.kernel = "triton" is for float32 logits on a GPU, but these are {logits.dtype} '
            f"on {logits.device.type}; remove loss.kernel"
        )
    return triton_softmax.TritonSoftmax
