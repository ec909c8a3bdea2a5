"""`trainer.head.row_softmax` in Triton, for CUDA: three passes over the logits instead of eight.

Both kernels give the same bits on every run: a program owns its row, or its part of one, without
atomics. The log-sum-exp is accumulated lane by lane (Milakov and Gimelshein, arXiv 1805.02867) and
reduced at the end, so a row is read once.

Checked against the dense oracle in Triton's interpreter (``TRITON_INTERPRET=1``), which needs no
GPU and does not show speed.

Shapes: T rows of a chunk, V vocabulary.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the kernels run on CPU tensors in the interpreter; Triton decides it on import."""

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
    """One row per program: its highest logit, and the sum of exp(logit - highest)."""
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
    """A part of a row per program: overwrites the logits with exp(logit - peak) * factor."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * LANES + tl.arange(0, LANES)
    here = logits + row * stride + at
    logit = tl.load(here, mask=at < num_ids, other=LOWEST)
    share = tl.exp(logit - tl.load(peak + row))
    tl.store(here, share * tl.load(factor + row), mask=at < num_ids)
