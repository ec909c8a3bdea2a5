"""Audits a few positions against their full distribution, in float64.

Computed on the logits' device, independently of the labels: no blockwise selection, no fixed point,
no shared buffer, twice the precision. ``labeler.quality.fidelity`` compares the result with the
labels as stored, after rounding.
"""

import torch


def audit_logits(
    logits: torch.Tensor, entry_ids: torch.Tensor, head_len: torch.Tensor
) -> torch.Tensor:
    """Evaluates the full distribution at A positions on the entries that their labels keep.

    Args:
        logits: floating [A, V], as for ``label_logits``.
        entry_ids: integer [A, K].
        head_len: integer [A].

    Returns:
        float32 [A, K + 2]: the columns of ``labeler.teachers.audits.Audit`` except the first.
    """
    logprobs = torch.log_softmax(logits.double(), dim=-1)
    ids = entry_ids.long()
    in_head = torch.arange(ids.shape[1], device=ids.device) < head_len[:, None]
    outside = logprobs.exp()
    rows, slots = in_head.nonzero(as_tuple=True)
    outside[rows, ids[rows, slots]] = 0.0
    most = min(ids.shape[1], logits.shape[1])
    best = logprobs.topk(most, dim=-1).values.exp() * in_head[:, :most]
    columns = [logprobs.gather(1, ids), outside.sum(1, keepdim=True), best.sum(1, keepdim=True)]
    return torch.cat(columns, dim=1).float()
