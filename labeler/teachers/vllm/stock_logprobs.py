"""vLLM's own prompt log-probabilities, for when the label head does not fit this vLLM.

Far slower, with a list entry per candidate and, in the V1 runner, a [tokens, vocabulary] tensor per
prompt; and limited to the candidates (see ``topk_candidates``).
"""

from typing import Any

import numpy as np

from labeler.teachers.protocol import RowLabels
from labeler.teachers.topk_candidates import labels_from_topk
from schemas.errors import TeacherError
from schemas.record.spans import span_targets
from schemas.spec import RecordSpec


def stock_params(num_candidates: int) -> Any:
    """Sampling parameters of a request for the candidates of each position."""
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=1,  # the least an engine generates; the token is discarded
        temperature=0.0,
        detokenize=False,
        prompt_logprobs=num_candidates,
        flat_logprobs=True,
    )


def stock_row_labels(
    output: Any, token_ids: np.ndarray, label_spans: np.ndarray, record: RecordSpec, vocab_size: int
) -> RowLabels:
    """The labels in the output of a request for min(k, V) candidates.

    Raises:
        TeacherError: the output does not hold what was requested for every position.
    """
    flat = output.prompt_logprobs
    width = min(record.k, vocab_size)
    # The first position has nothing; each later one has its own token, then the candidates.
    starts, ends = np.array(flat.start_indices), np.array(flat.end_indices)
    expected = [width + 1] * (len(token_ids) - 1)
    if len(starts) != len(token_ids) or (ends - starts)[1:].tolist() != expected:
        raise TeacherError(
            f"vLLM returned {len(flat.token_ids)} log-probabilities for {len(starts)} positions, "
            f"expected {width + 1} for each of {len(expected)}"
        )
    rows = span_targets(label_spans) - 1
    ids = np.array(flat.token_ids, np.int32).reshape(-1, width + 1)[rows]
    logprobs = np.array(flat.logprobs, np.float64).reshape(-1, width + 1)[rows]
    ranks = np.array([flat.ranks[start] for start in starts[1:]], np.int64)[rows]
    if (ids[:, 0] != token_ids[rows + 1]).any():
        raise TeacherError("vLLM's log-probabilities do not begin with the prompt's own token")
    own, head = logprobs[:, 0].copy(), logprobs[:, 1:].copy()
    return labels_from_topk(ids[:, 1:], head, own, ranks, vocab_size)


def stock_entry_logprobs(output: Any, targets: np.ndarray, entry_ids: np.ndarray) -> np.ndarray:
    """Log-probabilities of given ids in the output of a request made with ``stock_params``.

    Args:
        output: of the request.
        targets: int64 [N], target indices.
        entry_ids: integer [N, K].

    Returns:
        float64 [N, K], nats; NaN for ids that are not among the candidates.
    """
    flat = output.prompt_logprobs
    values = np.full(entry_ids.shape, np.nan)
    for label, target in enumerate(targets):
        here = slice(flat.start_indices[target], flat.end_indices[target])
        known = dict(zip(flat.token_ids[here], flat.logprobs[here], strict=True))
        values[label] = [known.get(int(one), np.nan) for one in entry_ids[label]]
    return values
