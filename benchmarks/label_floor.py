"""The time that no labeller can avoid: the head's matmul and a logsumexp for every label."""

from functools import partial
from typing import Any

import torch

from benchmarks.harness import timed
from labeler.label_head.buffers import SliceBuffers
from labeler.label_head.position_labels import row_slices
from labeler.label_head.thread_pool import SlicePool
from labeler.teachers.vllm.worker.label_step import rows_at_once
from schemas.spec import RecordSpec

_BARE = RecordSpec(kind="topk", k=1, entropy=False)
"""A record whose only buffer is the softmax."""


def floor_seconds(model: Any, num_labels: int, hidden_size: int) -> float:
    """Seconds for a number of labels, inside the engine.

    The product is the engine's own, in the label head's parts. The logsumexp is the fastest we
    know: on a CPU, log Z = x - log p(x) of a softmax in reused memory, with slices shared among all
    cores. torch's own product and logsumexp took twice as long at V = 4,096, and more than four
    times as long at V = 152k.

    Args:
        model: the engine's, with ``compute_logits``.
        num_labels: T.
        hidden_size: H, of random hidden states [T, H].
    """
    device = next(model.parameters()).device
    pool = SlicePool(device)
    with torch.inference_mode():
        hidden = torch.randn(num_labels, hidden_size, dtype=torch.bfloat16, device=device)
        step = rows_at_once(model.compute_logits(hidden[:1]).shape[1])

        def piece(first: int) -> None:
            logits = model.compute_logits(hidden[first : first + step])
            pool.map(partial(_normaliser, logits), list(row_slices(logits, pool.num_threads)))

        piece(0)  # threads and memory

        def everything() -> None:
            for first in range(0, num_labels, step):
                piece(first)

        return timed(everything, device.type).wall_s


def _normaliser(logits: torch.Tensor, rows: slice, buffers: SliceBuffers) -> torch.Tensor:
    if logits.device.type != "cpu":
        return torch.logsumexp(logits[rows].float(), dim=-1)
    buffers.fit(rows.stop - rows.start, logits, _BARE)
    assert buffers.probs is not None
    part = buffers.in_float32(logits[rows])
    probs = torch.softmax(part, dim=-1, out=buffers.probs[: len(part)])
    return part[:, 0] - probs[:, 0].log()
