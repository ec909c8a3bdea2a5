"""What a teacher is, what it gives back, and which requests it refuses before running anything.

Nothing here imports torch or an engine; ``make_teacher`` does so when it is called.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from labeler.audits import Audit
from labeler.config import TeacherConfig
from schemas.draws import uniforms
from schemas.errors import TeacherError
from schemas.spec import GenerationSpec, RecordSpec


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


@dataclass(frozen=True)
class RowFailure:
    """A request that the teacher could not serve: a short fixed reason, and the facts."""

    reason: str
    detail: str


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
    ) -> list[RowLabels | RowFailure]:
        """Labels sequences.

        Args:
            token_ids: one integer array [L] a request.
            label_spans: one flat integer array of half-open [start, end) pairs of target indices a
                request; sorted, disjoint, start >= 1, end <= L.
            row_keys: uint8 [R, 16], which with the target indices decide the draws.
            audit_rate: share of the labels that come with an ``Audit``.

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
    ) -> list[list[np.ndarray] | RowFailure]:
        """Samples ``generation.n`` responses a prompt.

        Args:
            prompt_ids: one integer array [P] a prompt.
            generation: temperature (0 is greedy), top_p, max_tokens, n.
            seeds: n seeds a prompt, one for each sample.

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


def make_teacher(config: TeacherConfig, record: RecordSpec) -> Teacher:
    """Loads the teacher of a configuration.

    Raises:
        TeacherError: the model cannot be loaded, or the backend cannot serve the record.
    """
    if config.backend == "vllm":
        from labeler.teachers.vllm_teacher import VllmTeacher

        return VllmTeacher(config, record)
    if config.backend == "transformers":
        from labeler.teachers.transformers_teacher import TransformersTeacher

        return TransformersTeacher(config, record)
    if config.backend == "remote":
        from labeler.teachers.remote_teacher import RemoteTeacher

        return RemoteTeacher(config, record)
    raise TeacherError(
        f'there is no teacher to make for teacher.backend = "{config.backend}"; '
        'expected "vllm", "transformers" or "remote"'
    )


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
    bad = np.flatnonzero((token_ids < 0) | (token_ids >= vocab_size))
    if len(bad):
        place = int(bad[0])
        return RowFailure(
            "unknown_token",
            f"token {int(token_ids[place])} at index {place}, but the teacher has the ids "
            f"0 to {vocab_size - 1}",
        )
    return None


def refuse_spans(num_tokens: int, spans: np.ndarray) -> RowFailure | None:
    """Why flat [start, end) pairs cannot span labels of ``num_tokens`` tokens; None if they can."""
    if len(spans) == 0 or len(spans) % 2:
        return RowFailure("bad_spans", f"{len(spans)} span bounds; expected one or more pairs")
    bounds = np.asarray(spans, dtype=np.int64)
    starts, ends = bounds[::2], bounds[1::2]
    if starts[0] < 1 or ends[-1] > num_tokens:
        return RowFailure(
            "bad_spans", f"spans cover [{starts[0]}, {ends[-1]}); expected within [1, {num_tokens})"
        )
    if (starts >= ends).any() or (ends[:-1] > starts[1:]).any():
        return RowFailure("bad_spans", f"spans {bounds.tolist()} are empty, unsorted or overlap")
    return None


def span_targets(spans: np.ndarray) -> np.ndarray:
    """Target indices, int64 [N], of flat [start, end) pairs."""
    bounds = np.asarray(spans, dtype=np.int64)
    return np.concatenate(
        [np.arange(start, end) for start, end in zip(bounds[::2], bounds[1::2], strict=True)]
    )


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
