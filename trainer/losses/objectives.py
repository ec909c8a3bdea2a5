"""The training objectives: loss and gradient of each position.

The student's softmax q over V ids is reduced to the cached ids S of a position and one bucket for
all other ids, r = 1 - sum of q over S. An objective gives a loss per position and its gradient with
respect to the student's logits: one number per entry of S, and c, the bucket's gradient, which the
ids off S receive in proportion to their share of r:

    dloss / dlogit_i = entry_gradient_i      i in S
    dloss / dlogit_i = (q_i / r) * c         i off S

Shares of r, rather than q itself, keep this exact down to the smallest r that float32 represents.
With w the teacher's probabilities on S, m its mass off S and P = 1 - m:

| objective    | loss                                    | entry_gradient | c              |
|--------------|-----------------------------------------|----------------|----------------|
| truncated    | sum w (log w - log q)                   | P q - w        | P r            |
| renormalised | sum w/P (log w/P - log q)               | q - w/P        | r              |
| ghost        | sum w (log w - log q) + m log(m / r)    | q - w          | r - m          |
| forward_kl   | sum w (log p - log q), w from draws     | W q - w        | W r            |
| divergences  | sum over S and the bucket               | q (g - gbar)   | r (g_b - gbar) |

`trainer.losses.divergences` defines the last line. ``hard``, cross-entropy without a teacher, is
computed in ``trainer.head.fused_head._cross_entropy``.

forward_kl is the objective of Random Sampling KD (arXiv 2503.16870, section 3) with the weights of
`trainer.losses.teacher_weights`: w estimates the teacher's p id by id, W = sum w has mean one, and
the expectations of loss and gradient (q W - w at every id) are those of the KL on the full
distribution. On labels with draws, for every other objective, S is the head plus the distinct
draws, each with its own p.

``loss.mix`` is a weighted sum of objectives and of their gradients. All share one softmax, so a mix
needs no further pass over the logits.

truncated and forward_kl may be negative at a position; they are reported as they are.

Shapes: T positions, E cached entries of all of them, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from trainer.config.train import LossConfig
from trainer.losses.compatibility import effective_kind
from trainer.losses.divergences import DIVERGENCES, Masses, divergence_terms, xlog_ratio
from trainer.losses.segments import Segments
from trainer.losses.targets import SparseTargets
from trainer.losses.teacher_weights import TeacherPartition, teacher_estimate, teacher_partition


@dataclass(frozen=True)
class StudentPartition:
    """The student at the distillation temperature, reduced to S and the bucket.

    Attributes:
        log_entries: [E], log of the full softmax at the entries of S, nats.
        log_tail: [T], log of its mass off S, nats, summed over the ids off S (never as 1 - Q).
        segments: assignment of entries to positions.
    """

    log_entries: Tensor
    log_tail: Tensor
    segments: Segments


@dataclass(frozen=True)
class LossAndGradient:
    """An objective at T positions.

    Attributes:
        loss: [T], nats.
        entry_gradient: [E], with respect to the logits of S.
        tail_gradient: [T], c, the bucket's gradient.
    """

    loss: Tensor
    entry_gradient: Tensor
    tail_gradient: Tensor


def evaluate_objective(
    targets: SparseTargets, loss: LossConfig, student: StudentPartition
) -> LossAndGradient:
    """Evaluates ``loss.kind``, mixed with the objectives in ``loss.mix``.

    Args:
        targets: labels of T positions.
        loss: objective, mix and temperature.
        student: at that temperature, on the labels' entries.

    Raises:
        ConfigError: the labels cannot serve it (`trainer.losses.compatibility.effective_kind`).
        RecordError: a position has no entries (`teacher_partition`).
    """
    parts = [(share, _evaluate_one(targets, one, student)) for share, one in loss.objectives()]
    if len(parts) == 1:
        return parts[0][1]
    return LossAndGradient(
        *(
            torch.stack([share * getattr(part, field.name) for share, part in parts]).sum(0)
            for field in fields(LossAndGradient)
        )
    )


def _evaluate_one(
    targets: SparseTargets, loss: LossConfig, student: StudentPartition
) -> LossAndGradient:
    kind = effective_kind(loss, targets.record)
    segments, dtype = student.segments, student.log_entries.dtype
    if kind == "forward_kl":
        teacher = teacher_estimate(targets, loss.temperature, segments, dtype)
        total = segments.sum(teacher.weights)
        return _weighted_kl(teacher.weights, teacher.log_probs, student, total)
    partition = teacher_partition(targets, loss.temperature, segments, dtype)
    if kind in DIVERGENCES:
        return divergence(partition, student, loss)
    return PARTITION_OBJECTIVES[kind](partition, student)


def _weighted_kl(
    weights: Tensor, log_probs: Tensor, student: StudentPartition, total: Tensor | None = None
) -> LossAndGradient:
    """sum w (log p - log q) over S.

    Args:
        weights: [E], w.
        log_probs: [E], log p.
        student: q.
        total: [T], W, the sum of the weights over all ids; None means 1.
    """
    segments = student.segments
    loss = segments.sum(xlog_ratio(weights, log_probs - student.log_entries))
    entries, tail = student.log_entries.exp(), student.log_tail.exp()
    if total is not None:
        entries, tail = segments.spread(total) * entries, total * tail
    return LossAndGradient(loss, entries.sub_(weights), tail)


def truncated(teacher: TeacherPartition, student: StudentPartition) -> LossAndGradient:
    """Forward KL summed over S alone, with the student's full softmax. Biased."""
    log_weights = teacher.log_weights(student.segments)
    return _weighted_kl(log_weights.exp(), log_weights, student, 1.0 - teacher.tail)


def renormalised(teacher: TeacherPartition, student: StudentPartition) -> LossAndGradient:
    """Forward KL from the teacher renormalised over S to the student's full softmax. Biased."""
    log_weights = teacher.log_shares(student.segments)
    return _weighted_kl(log_weights.exp(), log_weights, student)


def ghost(teacher: TeacherPartition, student: StudentPartition) -> LossAndGradient:
    """Forward KL over S and the bucket: a lower bound of the full KL, with the exact tail mass."""
    log_weights = teacher.log_weights(student.segments)
    head = _weighted_kl(log_weights.exp(), log_weights, student)
    return replace(
        head,
        loss=head.loss + xlog_ratio(teacher.tail, teacher.log_tail - student.log_tail),
        tail_gradient=head.tail_gradient - teacher.tail,
    )


def divergence(
    teacher: TeacherPartition, student: StudentPartition, loss: LossConfig
) -> LossAndGradient:
    """The divergence ``loss.kind`` of `trainer.losses.divergences`, on S and the bucket."""
    segments = student.segments
    entries = Masses.from_logs(teacher.log_weights(segments), student.log_entries)
    tail_q = student.log_tail.exp()
    tail = Masses(teacher.tail, teacher.log_tail, tail_q, student.log_tail)
    at_entries, at_tail = divergence_terms(entries, loss), divergence_terms(tail, loss)
    mean_slope = segments.sum(entries.q * at_entries.slope) + tail_q * at_tail.slope
    return LossAndGradient(
        segments.sum(at_entries.value) + at_tail.value,
        entries.q * (at_entries.slope - segments.spread(mean_slope)),
        tail_q * (at_tail.slope - mean_slope),
    )


PARTITION_OBJECTIVES: dict[str, Callable[[TeacherPartition, StudentPartition], LossAndGradient]] = {
    "truncated": truncated,
    "renormalised": renormalised,
    "ghost": ghost,
}
