"""Requests that no teacher can serve, refused before an engine sees them; draws."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from labeler.config import TeacherConfig
from labeler.teacher_model.identity import context_tokens, load_model_config, model_vocab_size
from labeler.teachers.protocol import RowLabels
from schemas.errors import RowFailure
from schemas.record.spans import span_problem, unknown_token_problem
from schemas.record.uniforms import uniforms
from schemas.spec import RecordSpec


@dataclass(frozen=True)
class ModelLimits:
    """Limits of a teacher, checked in advance because an engine aborts a batch over one bad prompt.

    Attributes:
        vocab_size: ids are in [0, vocab_size).
        context: tokens of the longest sequence, generated ones included.
    """

    vocab_size: int
    context: int

    @staticmethod
    def load(config: TeacherConfig) -> "ModelLimits":
        """The limits of a configured teacher."""
        return ModelLimits(model_vocab_size(load_model_config(config)), context_tokens(config))

    def refuse_request(self, token_ids: np.ndarray, spans: np.ndarray) -> RowFailure | None:
        """Why a labelling request cannot be served, or None if it can.

        Args:
            token_ids: integer [L].
            spans: flat [start, end) pairs of target indices.
        """
        # An engine generates at least one token after the sequence.
        refused = self._refuse_prompt(token_ids, self.context - 1)
        if refused is not None:
            return refused
        problem = (
            span_problem(spans, len(token_ids)) if len(spans) else "no spans; expected one or more"
        )
        return RowFailure("bad_spans", problem) if problem else None

    def refuse_requests(
        self, token_ids: Sequence[np.ndarray], label_spans: Sequence[np.ndarray]
    ) -> list[RowLabels | RowFailure | None]:
        """The results of requests as far as they are known in advance: the refused ones."""
        pairs = zip(token_ids, label_spans, strict=True)
        return [self.refuse_request(*pair) for pair in pairs]

    def refuse_generation(self, prompt_ids: np.ndarray, max_tokens: int) -> RowFailure | None:
        """Why no response can be sampled and labelled within the context; None if one can."""
        return self._refuse_prompt(prompt_ids, self.context - 1 - max_tokens)

    def _refuse_prompt(self, token_ids: np.ndarray, limit: int) -> RowFailure | None:
        if len(token_ids) == 0:
            return RowFailure("empty", "the sequence has no tokens")
        if len(token_ids) > limit:
            return RowFailure(
                "too_long", f"{len(token_ids)} tokens, but the teacher has room for at most {limit}"
            )
        problem = unknown_token_problem(token_ids, self.vocab_size)
        return RowFailure("unknown_token", problem) if problem else None


def row_uniforms(record: RecordSpec, row_key: bytes, targets: np.ndarray) -> np.ndarray | None:
    """The random numbers for the draws of a row.

    Args:
        record: decides how many a position needs, and the seed.
        row_key: 16 bytes.
        targets: int64 [N], target indices, rising.

    Returns:
        float64 [N, numbers per position], in [0, 1); None for kinds without draws.
    """
    if not record.has_draws:
        return None
    per_position = record.draws if record.kind == "sampled" else 1
    return uniforms(row_key, targets, per_position, record.draw_seed)
