"""Parses a vLLM server's prompt log-probabilities into labels of kind ``topk``.

The answer lists for each position its k most probable ids and its own token, with log-probabilities
and ranks; see ``topk_candidates`` for the fields that follow from these.
"""

from typing import Any

import numpy as np

from labeler.teachers.protocol import RowLabels
from labeler.teachers.topk_candidates import labels_from_topk
from schemas.errors import TeacherError
from schemas.record.spans import span_targets


def row_labels(
    prompt_logprobs: list[dict[str, dict[str, Any]] | None],
    token_ids: np.ndarray,
    label_spans: np.ndarray,
    k: int,
    vocab_size: int,
) -> RowLabels:
    """The labels of a row.

    Args:
        prompt_logprobs: For each of L positions ``{id: {"logprob", "rank"}}``: the k most probable
            ids, and the token at that position; the first is None.
        token_ids: integer [L].
        label_spans: flat [start, end) pairs of target indices.
        k: entries of a head.
        vocab_size: ids are in [0, vocab_size).

    Returns:
        Labels with heads of K = min(k, V) ids. A rank beyond the head counts ties in, as vLLM does.

    Raises:
        TeacherError: the answer does not hold what was requested.
    """
    width = min(k, vocab_size)
    targets = span_targets(label_spans)
    if len(prompt_logprobs) != len(token_ids):
        raise TeacherError(
            f"the server returned {len(prompt_logprobs)} positions for a row of {len(token_ids)} "
            "tokens; expected a vLLM server that does not truncate prompts"
        )
    ids = np.empty((len(targets), width), np.int32)
    logprobs = np.empty((len(targets), width), np.float64)
    own = np.empty(len(targets), np.float64)
    own_ranks = np.empty(len(targets), np.int64)
    for label, target in enumerate(targets):
        here = prompt_logprobs[target] or {}
        token = str(int(token_ids[target]))
        outside = len(here) == width + 1  # the token is not among the k
        if token not in here or len(here) not in (width, width + 1):
            raise TeacherError(
                f"the server returned {len(here)} ids for position {target}, expected its token "
                f"{token} and the {width} most probable ids"
            )
        own[label], own_ranks[label] = here[token]["logprob"], here[token]["rank"] or 0
        head = [item for item in here.items() if not outside or item[0] != token]
        ids[label] = [int(name) for name, _ in head]
        logprobs[label] = [entry["logprob"] for _, entry in head]
    return labels_from_topk(ids, logprobs, own, own_ranks, vocab_size)
