"""The teacher protocol and the labels that teachers return."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

from labeler.label_head.labels import Labels
from labeler.teachers.audits import Audit
from schemas.errors import RowFailure
from schemas.spec import GenerationSpec

OnRow = Callable[[int], None]
"""Called from any thread with the index of a request that the engine has finished.

For progress only. Must return immediately, because it blocks the engine.
"""


def ignore_row(_: int) -> None:
    """An ``OnRow`` for callers that show no progress."""


@dataclass(frozen=True)
class RowLabels(Labels[np.ndarray]):
    """The labels of one sequence of L tokens at its N target positions, before rounding.

    Targets are those of the row's label spans, in rising order. Entries past the longest label of
    the row may be cut off.

    Attributes:
        audit: the full distribution at sampled positions; None if no audit was requested.
    """

    audit: Audit | None = None

    @property
    def num_labels(self) -> int:
        """N."""
        return len(self.target_rank)

    def first_unusable(self) -> int | None:
        """Index of the first label with a NaN or an impossible target; None if all are usable."""
        usable = np.isfinite(self.target_logprob) & ~np.isnan(self.tail_logmass)
        usable &= ~np.isnan(self.entry_logprobs).any(axis=1)
        if self.entropy is not None:
            usable &= np.isfinite(self.entropy)
        if self.lse is not None:
            usable &= np.isfinite(self.lse).all(axis=1)
        return None if usable.all() else int(np.argmin(usable))


class Teacher(Protocol):
    """A model that labels sequences and samples responses. Thread-safe.

    Attributes:
        shareable: True if concurrent ``label`` and ``generate`` calls share the engine, so that one
            call starts while another finishes; an engine failure then fails all of them. False if
            calls are serialized.
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
            token_ids: one integer array [L] per request.
            label_spans: one flat integer array of half-open [start, end) pairs of target indices
                per request; sorted, disjoint, start >= 1, end <= L.
            row_keys: uint8 [R, 16]; together with the target indices they determine the draws.
            audit_rate: fraction of the labels that come with an ``Audit``.
            on_row: called for each row that the engine has finished.

        Returns:
            One result per request, in order. A request that cannot be labelled is a ``RowFailure``
            and does not affect the others.

        Raises:
            TeacherError: the engine itself failed, which says nothing about single rows.
        """

    def generate(
        self,
        prompt_ids: Sequence[np.ndarray],
        generation: GenerationSpec,
        seeds: Sequence[Sequence[int]],
        on_row: OnRow = ignore_row,
    ) -> list[list[np.ndarray] | RowFailure]:
        """Samples ``generation.n`` responses per prompt.

        Args:
            prompt_ids: one integer array [P] per prompt.
            generation: temperature (0 is greedy), top_p, max_tokens, n.
            seeds: n seeds per prompt, one for each sample.
            on_row: called once per sample with the index of its prompt.

        Returns:
            For each prompt its n responses, int32 arrays of at most ``max_tokens`` ids without the
            prompt. A response that was not cut off ends with its end-of-sequence id.

        Raises:
            TeacherError: the engine itself failed, which says nothing about single rows.
        """

    def provenance(self) -> dict[str, object]:
        """Backend, versions, device and settings, for the manifests."""

    def close(self) -> None:
        """Frees the model. The teacher cannot be used afterwards."""


@runtime_checkable
class WakeableTeacher(Protocol):
    """Optional extension of ``Teacher`` for out-of-process engines."""

    def wake(self) -> None:
        """Fails the calls that wait for an engine whose process has died."""


def usable_or_failure(labels: RowLabels) -> RowLabels | RowFailure:
    """The labels, or a failure if the model's numbers are unusable."""
    label = labels.first_unusable()
    if label is None:
        return labels
    return RowFailure(
        "not_finite",
        f"label {label} of {labels.num_labels}: the teacher's logits hold NaN, or it gives the "
        "target token zero probability",
    )
