"""Reconstructs the teacher's distribution at a distillation temperature from cached labels.

The same entries can be read in two ways:

- `teacher_partition`: the teacher's own probabilities on the cached ids S, and one bucket for all
  other ids. Exact, but blind within the bucket.
- `teacher_estimate`: weights w on S whose expectation over the draws is the full distribution, id
  by id (Horvitz and Thompson 1952). Anything linear in w is unbiased, so w is never rescaled to sum
  to one: W = sum of w is random with mean one.

Let s be the temperature of the draws, p_s(i) = exp(lp_i / s - lse_s), and a the share of p_s that
one draw represents (``RecordSpec.draw_share``: tau for threshold labels, 1/n for n independent
draws). At temperature T, an id drawn c times has the weight

    w = c * a * p_T(i) / p_s(i) = c * a * exp(lp (1/T - 1/s) - lse_T + lse_s),      lse_1 = 0

which is bounded for T <= s. Exact entries have the weight p_T(i), at T = 1 rescaled to the exact
head mass.

Shapes: T labelled positions, E cached entries of all of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from schemas.errors import ConfigError, RecordError
from trainer.losses.compatibility import temperature_column
from trainer.losses.segments import Segments
from trainer.losses.targets import SparseTargets


@dataclass(frozen=True)
class TeacherPartition:
    """The teacher at one temperature, on the cached ids S and one bucket for all other ids.

    Attributes:
        scaled: [E], log-probability of each entry divided by the temperature, not normalised.
        log_sum: [T], log-sum-exp of ``scaled`` over S.
        log_head: [T], log of the probability of S.
        tail, log_tail: [T], probability of the bucket and its log; may be exactly 0 and -inf.
    """

    scaled: Tensor
    log_sum: Tensor
    log_head: Tensor
    tail: Tensor
    log_tail: Tensor

    def log_weights(self, segments: Segments) -> Tensor:
        """[E], log-probability of each entry; probabilities at a position sum to 1 - tail."""
        return self.scaled + segments.spread(self.log_head - self.log_sum)

    def log_shares(self, segments: Segments) -> Tensor:
        """[E], log of each entry's share of S; shares at a position sum to 1."""
        return self.scaled - segments.spread(self.log_sum)


@dataclass(frozen=True)
class TeacherEstimate:
    """An unbiased estimate of the teacher at one temperature.

    Attributes:
        weights: [E], nonnegative; in expectation the teacher's probabilities of all V ids.
        log_probs: [E], the teacher's log-probability of each entry, nats.
    """

    weights: Tensor
    log_probs: Tensor


def teacher_partition(
    targets: SparseTargets, temperature: float, segments: Segments, dtype: torch.dtype
) -> TeacherPartition:
    """The teacher's distribution at `temperature` on the cached ids and a bucket.

    At temperature 1 the head's mass is P = 1 - exp(tail_logmass). At other temperatures the weights
    are exp(lp / T - lse_T), which is exact because the teacher computed lse_T over the full
    vocabulary. Drawn ids belong to S with their own probability, which is subtracted from the
    bucket.

    Args:
        targets: labels with a teacher.
        temperature: distillation temperature.
        segments: `targets.segments()`.
        dtype: of the result.

    Raises:
        ConfigError: the teacher's columns were not read or do not hold this temperature.
        RecordError: a position has no entries left, so S is empty and the loss would be zero.
    """
    tail_logmass = _tail_logmass(targets, dtype)
    _refuse_empty(targets)
    scaled = targets.entry_logprobs.to(dtype) / temperature
    log_sum = segments.logsumexp(scaled)
    if temperature == 1.0:
        log_tail = tail_logmass
        if targets.entry_draws is not None:
            drawn = torch.where(targets.entry_draws > 0, scaled.exp(), 0.0)
            log_tail = (log_tail.exp() - segments.sum(drawn)).clamp(min=0.0).log()
        # Entries are rescaled to this mass: their float16 probabilities may sum to more than 1,
        # which would flip the sign of the bucket's gradient.
        log_head = torch.log(-torch.expm1(log_tail))
        return TeacherPartition(scaled, log_sum, log_head, log_tail.exp(), log_tail)
    # Rounding may lift the sum above 1, which means an empty bucket.
    log_head = (log_sum - _lse(targets, temperature, dtype)).clamp(max=0.0)
    tail = -torch.expm1(log_head)
    return TeacherPartition(scaled, log_sum, log_head, tail, tail.log())


def teacher_estimate(
    targets: SparseTargets, temperature: float, segments: Segments, dtype: torch.dtype
) -> TeacherEstimate:
    """Unbiased weights at `temperature` from labels with draws.

    Args:
        targets: labels of a record with draws.
        temperature: distillation temperature, at most ``record.drawn_at``.
        segments: `targets.segments()`.
        dtype: of the result.

    Raises:
        ConfigError: the teacher's columns were not read or do not hold this temperature.
    """
    tail_logmass, draws = _tail_logmass(targets, dtype), targets.entry_draws
    assert draws is not None, "check_loss admits only records with draws"
    logprobs = targets.entry_logprobs.to(dtype)
    drawn_at, is_draw = targets.record.drawn_at, draws > 0
    if temperature == 1.0:
        # Sampled labels have an empty head: its mass is 0 and nothing is rescaled.
        exact = torch.where(is_draw, 0.0, logprobs.exp())
        sums = segments.sum(exact)
        factor = torch.where(sums > 0, -torch.expm1(tail_logmass) / sums, 1.0)
        head_log_probs = logprobs + segments.spread(factor.log())
        log_probs = torch.where(is_draw, logprobs, head_log_probs)
    else:
        log_probs = logprobs / temperature - segments.spread(_lse(targets, temperature, dtype))
    share = draws.to(dtype) * targets.record.draw_share
    if temperature != drawn_at:
        at_draw = logprobs / drawn_at
        if drawn_at != 1.0:
            at_draw = at_draw - segments.spread(_lse(targets, drawn_at, dtype))
        share = share * (log_probs - at_draw).exp()
    return TeacherEstimate(torch.where(is_draw, share, log_probs.exp()), log_probs)


def _tail_logmass(targets: SparseTargets, dtype: torch.dtype) -> Tensor:
    if targets.tail_logmass is None:
        raise ConfigError(
            "the loss needs a teacher's labels, but these were read without the teacher's columns; "
            'read them for this loss (the `loss` of ViewDataset), or use loss.kind = "hard"'
        )
    return targets.tail_logmass.to(dtype)


def _lse(targets: SparseTargets, temperature: float, dtype: torch.dtype) -> Tensor:
    column = temperature_column(targets.temperatures, temperature)
    if targets.lse is None:
        raise ConfigError("column lse was not read, but temperatures other than 1 need it")
    return targets.lse[:, column].to(dtype)


def _refuse_empty(targets: SparseTargets) -> None:
    # Only possible if the student lacks every id of a position. On the CPU: no device sync.
    lengths = targets.entry_bounds.diff()
    if lengths.numel() and int(lengths.min()) == 0:
        raise RecordError(
            f"the student has no logit for any entry of label {int(lengths.argmin())} of a chunk, "
            'so this objective would ignore the label; use loss.kind = "forward_kl", which stays '
            "unbiased, or a student with the teacher's vocabulary"
        )
