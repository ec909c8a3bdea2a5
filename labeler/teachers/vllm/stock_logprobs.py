"""vLLM's own prompt log-probabilities, where the label head does not fit this vLLM.

Slower by far, a list entry for each candidate, and with a [tokens, vocabulary] tensor for each
prompt in the V1 runner; and it tells the candidates only (see ``candidates``).
"""

from typing import Any

import numpy as np

from labeler.teachers.protocol import RowLabels
from labeler.teachers.topk_candidates import labels_from_topk
from schemas.errors import TeacherError
from schemas.record.spans import span_targets
from schemas.spec import RecordSpec


def stock_params(record: RecordSpec, vocab_size: int) -> Any:
    """Sampling parameters of a request whose every position is scored."""
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=1,  # The least an engine generates; the token is thrown away.
        temperature=0.0,
        detokenize=False,
        prompt_logprobs=min(record.k, vocab_size),
        flat_logprobs=True,
    )


def stock_row_labels(
    output: Any, token_ids: np.ndarray, label_spans: np.ndarray, record: RecordSpec, vocab_size: int
) -> RowLabels:
    """The labels in the output of a request made with ``stock_params``.

    Raises:
        TeacherError: it does not tell of every position what was asked for.
    """
    flat = output.prompt_logprobs
    width = min(record.k, vocab_size)
    # The first position has no candidates; each other has the token that stands there, then those.
    starts, ends = np.array(flat.start_indices), np.array(flat.end_indices)
    if len(starts) != len(token_ids) or (ends - starts)[1:].tolist() != [width + 1] * (
        len(token_ids) - 1
    ):
        raise TeacherError(
            f"vLLM's own path tells {len(flat.token_ids)} candidates of {len(starts)} positions, "
            f"expected {width + 1} for each of {len(token_ids) - 1}"
        )
    rows = span_targets(label_spans) - 1
    ids = np.array(flat.token_ids, np.int32).reshape(-1, width + 1)[rows]
    logprobs = np.array(flat.logprobs, np.float64).reshape(-1, width + 1)[rows]
    ranks = np.array([flat.ranks[start] for start in starts[1:]], np.int64)[rows]
    if (ids[:, 0] != token_ids[rows + 1]).any():
        raise TeacherError("vLLM's own path does not tell first of the token that stands there")
    return labels_from_topk(
        ids[:, 1:], logprobs[:, 1:].copy(), logprobs[:, 0].copy(), ranks, vocab_size
    )
