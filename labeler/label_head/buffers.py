"""Scratch memory of the label head.

Shapes: V vocabulary.
"""

import torch

from labeler.label_head.draws import FixedPointBuffer
from schemas.spec import RecordSpec


class SliceBuffers:
    """Scratch memory for a slice of logits, reused from slice to slice and from call to call.

    On a CPU, allocating memory of this size costs more than the arithmetic in it. Not thread-safe.

    Attributes:
        probs: float32 [rows, V].
        fixed: for sums in fixed point; None for kinds without draws.
    """

    def __init__(self) -> None:
        self.probs: torch.Tensor | None = None
        self.fixed: FixedPointBuffer | None = None
        self._logits: torch.Tensor | None = None
        self._layout: tuple[object, ...] = ()
        self._rows = 0

    def fit(self, rows: int, logits: torch.Tensor, record: RecordSpec) -> None:
        """Allocates memory for ``rows`` rows of these logits, if not already allocated."""
        vocab_size, device = logits.shape[1], logits.device
        layout = (vocab_size, device, logits.dtype, record.has_draws)
        if layout == self._layout and rows <= self._rows:
            return
        self.probs = self.fixed = self._logits = None  # freed first, so that both never coexist
        self.probs = torch.empty(rows, vocab_size, device=device)
        if record.has_draws:
            self.fixed = FixedPointBuffer.allocate(rows, vocab_size, device)
        if logits.dtype != torch.float32:
            self._logits = torch.empty(rows, vocab_size, device=device)
        self._layout, self._rows = layout, rows

    def in_float32(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits of a slice in float32, copied only if they have another dtype."""
        if self._logits is None:
            return logits
        return self._logits[: len(logits)].copy_(logits)
