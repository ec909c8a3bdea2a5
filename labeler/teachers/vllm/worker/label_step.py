"""One step of an engine: the hidden states that it computed become labels."""

from collections.abc import Callable

import numpy as np
import torch

from labeler.label_head.position_labels import label_logits
from labeler.label_head.thread_pool import SlicePool
from labeler.teachers.vllm.packed_labels import Packed, pack
from labeler.teachers.vllm.worker.request_state import Chunk, deal, deal_audits, joined
from labeler.teachers.vllm.worker.tensor_parallel import (
    VocabParallelLogits,
    audit_rows,
    label_vocab_parallel,
)
from schemas.spec import RecordSpec

# Logits that exist at once: enough rows that the product with the head is efficient, whatever the
# vocabulary, and few enough that they stay in the cache of a CPU where the vocabulary is small.
_MIN_ROWS = 256
_LOGIT_ELEMENTS = 2**22


def rows_at_once(vocab_size: int) -> int:
    """Positions whose logits [rows, V] exist at once."""
    return max(_MIN_ROWS, _LOGIT_ELEMENTS // vocab_size)


def label_step(
    compute_logits: Callable[[torch.Tensor], torch.Tensor | None],
    shards: VocabParallelLogits | None,
    hidden_states: torch.Tensor,
    hidden_rows: np.ndarray,
    target_ids: torch.Tensor,
    shares: list[Chunk],
    record: RecordSpec,
    vocab_size: int,
    workers: SlicePool,
) -> None:
    """Labels rows of the hidden states and deals the results to the requests.

    Args:
        compute_logits: logits [rows, V] of hidden states; None in a worker that gets none.
        shards: of the logits, where several workers have parts of the vocabulary; None: not used.
        hidden_states: [tokens of the step, H].
        hidden_rows: int64 [T], which of them give the labels of the shares, one after the other.
        target_ids: integer [T], on the device of the hidden states.
        shares: whose positions these are; their rows are filled, on whatever device they are.
        record: what is kept.
        vocab_size: V.
        workers: share the work on a CPU.
    """
    device = hidden_states.device
    rows = torch.from_numpy(hidden_rows).to(device)
    uniforms = joined(shares, "uniforms") if record.has_draws else None
    audited = joined(shares, "is_audited")
    step = rows_at_once(vocab_size)
    packed: list[Packed] = []
    audits: list[torch.Tensor] = []
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        hidden, ids = hidden_states[rows[part]], target_ids[part]
        numbers = None if uniforms is None else uniforms[part]
        if shards is None:
            logits = compute_logits(hidden)
            if logits is None:
                continue  # One worker of a tensor-parallel group may get them all.
            found = _label(logits, ids, numbers, audited[part], record, workers)
        else:
            shard = shards.local_logits(hidden)
            found = label_vocab_parallel(
                shard, ids, numbers, audited[part], record, vocab_size, shards.group, workers
            )
        packed.append(found[0])
        audits += [] if found[1] is None else [found[1]]
    if packed:
        home = shares[0].row.packed.ranks.device
        deal(Packed(*(torch.cat(part).to(home) for part in zip(*packed, strict=True))), shares)
    if audits:
        deal_audits(torch.cat(audits).to(shares[0].row.packed.floats.device), shares)


def _label(
    logits: torch.Tensor,
    target_ids: torch.Tensor,
    uniforms: np.ndarray | None,
    audited: np.ndarray,
    record: RecordSpec,
    workers: SlicePool,
) -> tuple[Packed, torch.Tensor | None]:
    labels = label_logits(logits, target_ids, record, uniforms, workers)
    at = torch.from_numpy(np.flatnonzero(audited)).to(logits.device)
    audits = audit_rows(logits, labels, at, workers) if len(at) else None
    return pack(labels), audits
