"""Memory that is used over and over, because fresh memory of its size is dear on a CPU.

Shapes: V vocabulary.
"""

from typing import NamedTuple

import torch

from labeler.label_head.draws import FixedPointBuffer
from schemas.spec import RecordSpec


class SliceBuffers(NamedTuple):
    """Memory for one slice.

    Attributes:
        logits: float32 [rows of a slice, V]; None where the logits are of that type already.
        probs: float32 [rows of a slice, V].
        fixed: for the sums; None for kinds without draws.
    """

    logits: torch.Tensor | None
    probs: torch.Tensor
    fixed: FixedPointBuffer | None

    @staticmethod
    def of(rows: int, logits: torch.Tensor, record: RecordSpec) -> "SliceBuffers":
        """For up to ``rows`` rows at a time of logits like these, labelled by this record."""
        vocab_size, device = logits.shape[1], logits.device

        def empty() -> torch.Tensor:
            return torch.empty(rows, vocab_size, device=device)

        return SliceBuffers(
            None if logits.dtype == torch.float32 else empty(),
            empty(),
            FixedPointBuffer.of(rows, vocab_size, device) if record.has_draws else None,
        )

    def in_float32(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits of a slice, as they are or copied into the buffer."""
        if self.logits is None:
            return logits
        return self.logits[: len(logits)].copy_(logits)


class BufferCache:
    """Memory that all slices of all calls use.

    Fresh memory of this size costs a CPU more than what is done in it. For one thread at a time.
    """

    def __init__(self) -> None:
        self._what: tuple[object, ...] = ()
        self._rows = 0
        self._buffers: SliceBuffers | None = None

    def buffers(self, rows: int, logits: torch.Tensor, record: RecordSpec) -> SliceBuffers:
        """Buffers for slices of up to so many rows; those of the last call where they fit."""
        what = (logits.shape[1], logits.device, logits.dtype, record.has_draws)
        if self._buffers is None or what != self._what or rows > self._rows:
            self._buffers = None  # freed before more is asked for
            self._buffers = SliceBuffers.of(rows, logits, record)
            self._what, self._rows = what, rows
        return self._buffers
