"""The training targets: what each pulls the student towards, and its gradient.

A student's softmax q over V ids is seen through the cached ids S of a position and one bucket that
holds all the others, r = 1 - sum of q over S. A target gives, per position, a loss and its gradient
with respect to the student's logits in two parts: one number per entry of S, and one number c for
the bucket, which spreads over the ids off S in proportion to their share of r:

    dloss / dlogit_i = entry_gradient_i      i in S
    dloss / dlogit_i = (q_i / r) * c         i off S

Shares of r, not q itself, keep this exact where r is as small as float32 can say.
With w the teacher's probabilities on S, m its mass off S and P = 1 - m:

| target       | loss                                    | entry_gradient | c     |
|--------------|-----------------------------------------|----------------|-------|
| truncated    | sum w (log w - log q)                   | P q - w        | P r   |
| renormalised | sum w/P (log w/P - log q)               | q - w/P        | r     |
| ghost        | sum w (log w - log q) + m log(m / r)    | q - w          | r - m |
| forward_kl   | sum w (log p - log q), w from draws     | W q - w        | W r   |
| divergences  | sum over S and the bucket               | q (g - gbar)   | r (g_b - gbar) |

The last line is `trainer.losses.divergences`: reverse_kl, jsd, skew_kl and tvd.
forward_kl is the target of Random Sampling KD (arXiv 2503.16870, section 3) with the weights of
`trainer.losses.teacher_weights`: w estimates the teacher's p id by id, W = sum w has mean one, and
loss and gradient (q W - w at every id) are, in expectation, those of the KL to the full
distribution. On labels with draws, S of all others is the head and the distinct draws, each with
its own p.

A mix of targets (``loss.mix``) is the sum of theirs, loss and gradient, by shares: all of them look
at the same softmax, so none needs a further pass over the logits.

The truncated and forward_kl losses may be negative at a position; they are reported as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from trainer.config.train import LossConfig
from trainer.losses.compatibility import objective
from trainer.losses.divergences import DIVERGENCES, Masses, cross, terms
from trainer.losses.segments import Segments
from trainer.losses.targets import SparseTargets
from trainer.losses.teacher_weights import (
    TeacherEstimate,
    TeacherPartition,
    teacher_estimate,
    teacher_partition,
)


@dataclass(frozen=True)
class StudentPartition:
    """The student at the distillation temperature, seen through S and the bucket.

    Attributes:
        log_entries: [E], log of the full softmax at the entries of S, nats.
        log_tail: [T], log of its mass off S, nats, from a sum over the ids off S (never 1 - Q).
        segments: how the entries belong to the positions.
    """

    log_entries: Tensor
    log_tail: Tensor
    segments: Segments


@dataclass(frozen=True)
class Pull:
    """Loss [T] (nats) of each position and its gradient in the two parts [E] and [T]."""

    loss: Tensor
    entry_gradient: Tensor
    tail_gradient: Tensor


def pull_of(targets: SparseTargets, loss: LossConfig, student: StudentPartition) -> Pull:
    """The target that `loss` names, or the mix of them, from labels and student at its temperature.

    Raises:
        ConfigError: the labels cannot serve it (see `trainer.losses.compatibility.check_loss`).
    """
    if not loss.mix:
        return _pull_of_one(targets, loss, student)
    pulls = [(share, _pull_of_one(targets, one, student)) for share, one in loss.targets()]
    return Pull(
        *(
            torch.stack([share * getattr(pull, field.name) for share, pull in pulls]).sum(0)
            for field in fields(Pull)
        )
    )


def _pull_of_one(targets: SparseTargets, loss: LossConfig, student: StudentPartition) -> Pull:
    kind, dtype = objective(loss, targets.record), student.log_entries.dtype
    if kind == "forward_kl":
        return forward_kl(
            teacher_estimate(targets, loss.temperature, student.segments, dtype), student
        )
    partition = teacher_partition(targets, loss.temperature, student.segments, dtype)
    if kind in DIVERGENCES:
        return divergence(partition, student, loss)
    return PARTITION_TARGETS[kind](partition, student)


def truncated(teacher: TeacherPartition, student: StudentPartition) -> Pull:
    """Forward KL summed over S alone, the student's softmax over everything. Biased."""
    segments, head = student.segments, 1.0 - teacher.tail
    log_weights = teacher.log_weights(segments)
    weights = log_weights.exp()
    loss = segments.sum(cross(weights, log_weights - student.log_entries))
    gradient = (segments.spread(head) * student.log_entries.exp()).sub_(weights)
    return Pull(loss, gradient, head * student.log_tail.exp())


def renormalised(teacher: TeacherPartition, student: StudentPartition) -> Pull:
    """Forward KL from the teacher renormalised over S to the student's full softmax. Biased."""
    segments = student.segments
    log_weights = teacher.log_shares(segments)
    weights = log_weights.exp()
    loss = segments.sum(cross(weights, log_weights - student.log_entries))
    return Pull(loss, student.log_entries.exp().sub_(weights), student.log_tail.exp())


def ghost(teacher: TeacherPartition, student: StudentPartition) -> Pull:
    """Forward KL over S and the bucket: a lower bound of the full KL, with the exact tail mass."""
    segments = student.segments
    log_weights = teacher.log_weights(segments)
    weights = log_weights.exp()
    loss = segments.sum(cross(weights, log_weights - student.log_entries))
    loss += cross(teacher.tail, teacher.log_tail - student.log_tail)
    gradient = student.log_entries.exp().sub_(weights)
    return Pull(loss, gradient, student.log_tail.exp() - teacher.tail)


def forward_kl(teacher: TeacherEstimate, student: StudentPartition) -> Pull:
    """An unbiased estimate of the forward KL to the full distribution. Needs draws."""
    segments = student.segments
    total = segments.sum(teacher.weights)
    loss = segments.sum(cross(teacher.weights, teacher.log_probs - student.log_entries))
    gradient = (segments.spread(total) * student.log_entries.exp()).sub_(teacher.weights)
    return Pull(loss, gradient, total * student.log_tail.exp())


def divergence(teacher: TeacherPartition, student: StudentPartition, loss: LossConfig) -> Pull:
    """The divergence of `trainer.losses.divergences` that `loss` names, on S and the bucket."""
    segments = student.segments
    entries = Masses.of(teacher.log_weights(segments), student.log_entries)
    tail_q = student.log_tail.exp()
    tail = Masses(teacher.tail, teacher.log_tail, tail_q, student.log_tail)
    at_entries, at_tail = terms(entries, loss), terms(tail, loss)
    mean_slope = segments.sum(entries.q * at_entries.slope) + tail_q * at_tail.slope
    return Pull(
        segments.sum(at_entries.value) + at_tail.value,
        entries.q * (at_entries.slope - segments.spread(mean_slope)),
        tail_q * (at_tail.slope - mean_slope),
    )


PARTITION_TARGETS: dict[str, Callable[[TeacherPartition, StudentPartition], Pull]] = {
    "truncated": truncated,
    "renormalised": renormalised,
    "ghost": ghost,
}
