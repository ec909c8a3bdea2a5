"""`trainer.head.row_softmax` by Triton, for CUDA: three passes over the logits, not eight.

Both kernels give the same bits on every run: a program owns its row, or its part of one, and there
are no atomics. The log-sum-exp is kept lane by lane (Milakov and Gimelshein, arXiv 1805.02867) and
joined at the end, so that a row is read once.

Checked against the dense oracle in Triton's interpreter (``TRITON_INTERPRET=1``), which needs no
GPU and knows nothing of speed.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run on CPU tensors, slowly, as they did when this was imported."""

LANES = 2048
"""Logits that a program looks at at once: 8 kB, two a thread of 8 warps each time."""

LOWEST = tl.constexpr(float(torch.finfo(torch.float32).min))
"""Stands for no logit. Not -inf, of which differences are not numbers."""


class TritonSoftmax:
    """For float32 logits on a GPU. See `trainer.head.row_softmax.RowSoftmax`."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits
        # Kept apart: exp(logit - lse) would round where logits are large.
        self._peak, self._total = logits.new_empty((2, logits.shape[0])).unbind()
        num_rows, num_ids = logits.shape
        if num_rows:
            _sums[(num_rows,)](
                logits, self._peak, self._total, num_ids, logits.stride(0), LANES, num_warps=8
            )
        self.lse = self._peak + self._total.log()

    def times_(self, factor: Tensor) -> None:
        """In place, part by part of every row."""
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
    """One row a program: its highest logit, and the sum of exp(logit - highest)."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    highest = tl.full([LANES], LOWEST, tl.float32)
    here = tl.zeros([LANES], tl.float32)
    for start in range(0, num_ids, LANES):
        at = start + lane
        logit = tl.load(logits + row * stride + at, mask=at < num_ids, other=LOWEST)
        # A maximum may pass over NaN; the exponential does not.
        higher = tl.maximum(highest, logit)
        here = here * tl.exp(highest - higher)
        here += tl.where(at < num_ids, tl.exp(logit - higher), 0.0)
        highest = higher
    top = tl.max(highest, 0)
    tl.store(peak + row, top)
    tl.store(total + row, tl.sum(here * tl.exp(highest - top), 0))


@triton.jit
def _times(logits, peak, factor, num_ids, stride, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """A part of a row a program: exp(logit - peak) * factor, in the logits' place."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * LANES + tl.arange(0, LANES)
    here = logits + row * stride + at
    logit = tl.load(here, mask=at < num_ids, other=LOWEST)
    share = tl.exp(logit - tl.load(peak + row))
    tl.store(here, share * tl.load(factor + row), mask=at < num_ids)
