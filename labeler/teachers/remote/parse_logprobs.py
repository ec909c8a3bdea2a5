"""What a vLLM server says of a prompt's positions -> labels of kind ``topk``.

The answer lists for each position the k most probable ids and the token that stands there, with
log-probabilities and ranks; see ``candidates`` for what follows from these.
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
            ids over the token there, and that token itself; the first is None.
        token_ids: integer [L].
        label_spans: flat [start, end) pairs of target indices.
        k: entries of a head.
        vocab_size: ids are in [0, vocab_size).

    Returns:
        Heads of K = min(k, V) ids. A rank beyond the head counts ids that are exactly as probable
        as the token in, as vLLM does.

    Raises:
        TeacherError: the answer is not what was asked for.
    """
    width = min(k, vocab_size)
    targets = span_targets(label_spans)
    if len(prompt_logprobs) != len(token_ids):
        raise TeacherError(
            f"the server tells of {len(prompt_logprobs)} positions of a row of {len(token_ids)} "
            "tokens; it has to be a vLLM server, and nothing may cut its prompts"
        )
    ids = np.empty((len(targets), width), np.int32)
    logprobs = np.empty((len(targets), width), np.float64)
    own = np.empty(len(targets), np.float64)
    told_ranks = np.empty(len(targets), np.int64)
    for label, target in enumerate(targets):
        here = prompt_logprobs[target] or {}
        token = str(int(token_ids[target]))
        outside = len(here) == width + 1  # then the token is not among the k
        if token not in here or len(here) not in (width, width + 1):
            raise TeacherError(
                f"the server tells {len(here)} ids of position {target}, expected the token "
                f"{token} that stands there and the {width} most probable ones"
            )
        own[label], told_ranks[label] = here[token]["logprob"], here[token]["rank"] or 0
        head = [item for item in here.items() if not outside or item[0] != token]
        ids[label] = [int(name) for name, _ in head]
        logprobs[label] = [entry["logprob"] for _, entry in head]
    return labels_from_topk(ids, logprobs, own, told_ranks, vocab_size)
