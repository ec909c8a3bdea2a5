"""Requests that no teacher can serve, found before an engine sees them; targets and their draws."""

import numpy as np

from schemas.errors import RowFailure
from schemas.record.spans import span_problem, unknown_token_problem
from schemas.record.uniforms import uniforms
from schemas.spec import RecordSpec


def refuse_request(
    token_ids: np.ndarray, spans: np.ndarray, vocab_size: int, context: int
) -> RowFailure | None:
    """Why a labelling request cannot be served, or None if it can.

    An engine aborts a whole batch on one bad prompt, so what is wrong is found before.

    Args:
        token_ids: integer [L].
        spans: flat [start, end) pairs of target indices.
        vocab_size: ids are in [0, vocab_size).
        context: the model's context; an engine wants to generate one token after the sequence, so
            a sequence is one shorter.
    """
    refused = _refuse_prompt(token_ids, vocab_size, context - 1)
    return refused or refuse_spans(len(token_ids), spans)


def refuse_generation(
    prompt_ids: np.ndarray, max_tokens: int, vocab_size: int, context: int
) -> RowFailure | None:
    """Why no response can be sampled and then labelled within the context, or None if one can."""
    return _refuse_prompt(prompt_ids, vocab_size, context - 1 - max_tokens)


def _refuse_prompt(token_ids: np.ndarray, vocab_size: int, limit: int) -> RowFailure | None:
    if len(token_ids) == 0:
        return RowFailure("empty", "the sequence has no tokens")
    if len(token_ids) > limit:
        return RowFailure(
            "too_long", f"{len(token_ids)} tokens, but the teacher has room for at most {limit}"
        )
    problem = unknown_token_problem(token_ids, vocab_size)
    return RowFailure("unknown_token", problem) if problem else None


def refuse_spans(num_tokens: int, spans: np.ndarray) -> RowFailure | None:
    """Why flat [start, end) pairs cannot span labels of ``num_tokens`` tokens; None if they can."""
    if len(spans) == 0:
        return RowFailure("bad_spans", "no spans; expected one or more")
    problem = span_problem(spans, num_tokens)
    return RowFailure("bad_spans", problem) if problem else None


def row_uniforms(record: RecordSpec, row_key: bytes, targets: np.ndarray) -> np.ndarray | None:
    """The random numbers of a row's draws.

    Args:
        record: says how many a position needs, and from which seed.
        row_key: 16 bytes.
        targets: int64 [N], target indices, rising.

    Returns:
        float64 [N, numbers of a position], in [0, 1); None for kinds without draws.
    """
    if not record.has_draws:
        return None
    per_position = record.draws if record.kind == "sampled" else 1
    return uniforms(row_key, targets, per_position, record.draw_seed)
