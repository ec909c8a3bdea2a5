"""Rejects requests that no teacher can serve before they reach an engine."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from labeler.config import TeacherConfig
from labeler.teacher_model.identity import context_tokens, load_model_config, model_vocab_size
from labeler.teachers.protocol import RowLabels
from schemas.errors import RowFailure
from schemas.record.spans import span_problem, unknown_token_problem


@dataclass(frozen=True)
class ModelLimits:
    """Limits of a teacher, checked up front because one bad prompt makes an engine abort the batch.

    Attributes:
        vocab_size: ids are in [0, vocab_size).
        context: maximum sequence length in tokens, including generated ones.
    """

    vocab_size: int
    context: int

    @staticmethod
    def load(config: TeacherConfig) -> "ModelLimits":
        """Loads the limits of a configured teacher."""
        return ModelLimits(model_vocab_size(load_model_config(config)), context_tokens(config))

    def refuse_request(self, token_ids: np.ndarray, spans: np.ndarray) -> RowFailure | None:
        """Returns why a labelling request cannot be served, or None if it can.

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
        """One failure per refused request; None for requests that can be served."""
        pairs = zip(token_ids, label_spans, strict=True)
        return [self.refuse_request(*pair) for pair in pairs]

    def refuse_generation(self, prompt_ids: np.ndarray, max_tokens: int) -> RowFailure | None:
        """Returns why no response fits the context, or None if one can be sampled and labelled."""
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
