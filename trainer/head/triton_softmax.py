"""`trainer.head.row_softmax` in Triton, for CUDA: three passes over the logits instead of eight.

Both kernels are bitwise reproducible: each program owns its row or part of a row, without atomics.
The log-sum-exp is accumulated per lane (Milakov and Gimelshein, arXiv 1805.02867) and reduced at
the end, so each row is read once.

Tested against the dense oracle in Triton's interpreter (``TRITON_INTERPRET=1``), which needs no GPU
and says nothing about speed.

Shapes: T rows of a chunk, V vocabulary.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the kernels run on CPU tensors in the interpreter; fixed when Triton is imported."""

LANES = 2048
"""Logits per iteration of a program: 8 kB, eight per thread of 8 warps."""

LOWEST = tl.constexpr(float(torch.finfo(torch.float32).min))
"""Represents an absent logit. Not -inf: differences of infinities are NaN."""


class TritonSoftmax:
    """`trainer.head.row_softmax.RowSoftmax` for float32 logits on a GPU."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits
        # Peak and sum stay separate: exp(logit - lse) would round if logits are large.
        self._peak, self._total = logits.new_empty((2, logits.shape[0])).unbind()
        num_rows, num_ids = logits.shape
        if num_rows:
            _sums[(num_rows,)](
                logits, self._peak, self._total, num_ids, logits.stride(0), LANES, num_warps=8
            )
        self.lse = self._peak + self._total.log()

    def times_(self, factor: Tensor) -> None:
        """See `RowSoftmax.times_`."""
        num_rows, num_ids = self._logits.shape
        if num_rows:
            _times[(num_rows, triton.cdiv(num_ids, LANES))](
                self._logits,
                self._peak,
                (factor / self._total).contiguous(),
                num_ids,
                self._logits.stride(0),
                LANES,
                num_warps=8,
            )


@triton.jit
def _sums(logits, peak, total, num_ids, stride, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Computes a row's highest logit and sum of exp(logit - highest); one program per row."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    highest = tl.full([LANES], LOWEST, tl.float32)
    here = tl.zeros([LANES], tl.float32)
    for start in range(0, num_ids, LANES):
        at = start + lane
        logit = tl.load(logits + row * stride + at, mask=at < num_ids, other=LOWEST)
        # A maximum may drop NaN; the exponential propagates it.
        higher = tl.maximum(highest, logit)
        here = here * tl.exp(highest - higher)
        here += tl.where(at < num_ids, tl.exp(logit - higher), 0.0)
        highest = higher
    top = tl.max(highest, 0)
    tl.store(peak + row, top)
    tl.store(total + row, tl.sum(here * tl.exp(highest - top), 0))


@triton.jit
def _times(logits, peak, factor, num_ids, stride, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Overwrites logits with exp(logit - peak) * factor; one program per part of a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * LANES + tl.arange(0, LANES)
    here = logits + row * stride + at
    logit = tl.load(here, mask=at < num_ids, other=LOWEST)
    share = tl.exp(logit - tl.load(peak + row))
    tl.store(here, share * tl.load(factor + row), mask=at < num_ids)
