"""The protocol that every teacher implements, and the results it returns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from labeler.teachers.audits import Audit
from schemas.errors import RowFailure
from schemas.spec import GenerationSpec

OnRow = Callable[[int], None]
"""Called with the index of a request whenever the engine has finished it; from any thread.

For progress only. It must return at once: the engine does not work meanwhile.
"""


def ignore_row(_: int) -> None:
    """An ``OnRow`` for callers that show no progress."""


@dataclass(frozen=True)
class RowLabels:
    """The labels of one sequence of L tokens at its N target positions, before rounding.

    Label j describes the teacher's distribution **over** the token at target index t_j, computed
    from the tokens before t_j; targets are those of the row's label spans, in rising order. K is
    what a label of this record holds at most, or the vocabulary where that is smaller; the first
    head_len + tail_len slots of a label are used, the others hold zeros.

    Attributes:
        entry_ids: int32 [N, K], the head by falling probability, ties by rising id, then the draws
            by rising id.
        entry_logprobs: float32 [N, K], nats, at temperature 1; -inf where the model forbids an id.
        head_len: int32 [N], exact entries.
        tail_len: int32 [N], distinct tail draws.
        entry_counts: [N, K], integers in [0, 255], how often each was drawn; None but for kind
            ``sampled``.
        tail_logmass: float32 [N], log of the probability outside the head; -inf where K is
            everything.
        target_logprob: float32 [N], of the token that stands in the sequence.
        target_rank: int32 [N], 1 + the number of ids strictly more probable.
        entropy: float32 [N], nats, of the full distribution; None if the record has no such column.
        lse: float32 [N, S], log sum of p^(1/T) for each temperature of the record; None if it has
            none.
        audit: the full distribution at some of the positions; None if no audit was asked for.
    """

    entry_ids: np.ndarray
    entry_logprobs: np.ndarray
    head_len: np.ndarray
    tail_len: np.ndarray
    entry_counts: np.ndarray | None
    tail_logmass: np.ndarray
    target_logprob: np.ndarray
    target_rank: np.ndarray
    entropy: np.ndarray | None
    lse: np.ndarray | None
    audit: Audit | None = None

    @property
    def num_labels(self) -> int:
        """N."""
        return len(self.target_rank)

    def first_unusable(self) -> int | None:
        """Index of the first label with a NaN or an impossible target, or None if there is none."""
        usable = np.isfinite(self.target_logprob) & ~np.isnan(self.tail_logmass)
        usable &= ~np.isnan(self.entry_logprobs).any(axis=1)
        if self.entropy is not None:
            usable &= np.isfinite(self.entropy)
        if self.lse is not None:
            usable &= np.isfinite(self.lse).all(axis=1)
        return None if usable.all() else int(np.argmin(usable))


class Teacher(Protocol):
    """A model that labels sequences and samples responses; may be called from several threads.

    Attributes:
        shareable: True where calls of ``label`` and ``generate`` that are in flight together share
            the engine, so that it goes on with the next call while this one ends; if it fails, it
            fails all of them. False where calls wait for each other.
    """

    shareable: ClassVar[bool]

    def label(
        self,
        token_ids: Sequence[np.ndarray],
        label_spans: Sequence[np.ndarray],
        row_keys: np.ndarray,
        audit_rate: float = 0.0,
        on_row: OnRow = ignore_row,
    ) -> list[RowLabels | RowFailure]:
        """Labels sequences.

        Args:
            token_ids: one integer array [L] a request.
            label_spans: one flat integer array of half-open [start, end) pairs of target indices a
                request; sorted, disjoint, start >= 1, end <= L.
            row_keys: uint8 [R, 16], which with the target indices decide the draws.
            audit_rate: share of the labels that come with an ``Audit``.
            on_row: called for each row that passed through the engine.

        Returns:
            One result a request, in order. A request that cannot be labelled is a ``RowFailure``
            and does not disturb the others.

        Raises:
            TeacherError: the engine itself failed, so that nothing can be said about single rows.
        """

    def generate(
        self,
        prompt_ids: Sequence[np.ndarray],
        generation: GenerationSpec,
        seeds: Sequence[Sequence[int]],
        on_row: OnRow = ignore_row,
    ) -> list[list[np.ndarray] | RowFailure]:
        """Samples ``generation.n`` responses a prompt.

        Args:
            prompt_ids: one integer array [P] a prompt.
            generation: temperature (0 is greedy), top_p, max_tokens, n.
            seeds: n seeds a prompt, one for each sample.
            on_row: called with the index of a prompt for each of its samples.

        Returns:
            For each prompt its n responses, int32 arrays of at most ``max_tokens`` ids without the
            prompt. A response that ended by itself ends with its end-of-sequence id.

        Raises:
            TeacherError: the engine itself failed, so that nothing can be said about single rows.
        """

    def provenance(self) -> dict[str, object]:
        """Backend, versions, device and settings, for the manifests."""

    def close(self) -> None:
        """Frees the model. The teacher cannot be used after it."""


def usable_or_failure(labels: RowLabels) -> RowLabels | RowFailure:
    """The labels, or a failure where the model gave numbers that mean nothing."""
    label = labels.first_unusable()
    if label is None:
        return labels
    return RowFailure(
        "not_finite",
        f"label {label} of {labels.num_labels}: the teacher's logits hold NaN, or it gives the "
        "token that stands there no probability at all",
    )
