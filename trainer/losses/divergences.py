"""Divergences between teacher and student on the cached ids S and one bucket for all other ids.

Let p and q be the probabilities of teacher and student on S, and m and r those of the bucket. Any
divergence D that is a sum over S and the bucket has, by the derivative of the softmax, the gradient

    dD / dlogit_i = q_i (g_i - gbar)             i in S, g_i = dD / dq_i
    dD / dlogit_i = (q_i / r) r (g_b - gbar)     i off S, g_b = dD / dr
    gbar = sum over S of q g + r g_b

A constant added to all of g cancels, so constants are omitted. At each id and at the bucket:

| divergence | summand                             | g                | from             |
|------------|-------------------------------------|------------------|------------------|
| reverse_kl | q log(q / p)                        | log(q / p)       | arXiv 2306.08543 |
| jsd        | b p log(p / M) + (1-b) q log(q / M) | (1-b) log(q / M) | arXiv 2306.13649 |
|            | M = b p + (1-b) q, b = loss.beta    |                  |                  |
| skew_kl    | p log(p / M), M = s p + (1-s) q     | -(1-s) p / M     | arXiv 2402.03898 |
|            | s = loss.skew                       |                  |                  |
| tvd        | abs(p - q) / 2                      | sign(q - p) / 2  | arXiv 2307.15190 |

0 log 0 = 0. Each is a lower bound of the same divergence on the full distribution, since the bucket
merges its ids; nothing is renormalised on S. For labels with draws, S is the head plus the distinct
draws, each with its own p, so the bound depends on the draws: biased, unlike ``forward_kl``.

To add a divergence, write a function here, enter it in `DIVERGENCES`, and add its name to
`trainer.config.train.LossKind`.

Shapes: T positions, E cached entries of all of them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.config.train import LossConfig

# Only reverse KL is unbounded where the teacher has no mass. A bucket without mass is often a
# rounding artifact: the mass left after the draws, or 1 - sum of weights at a temperature other
# than 1, is a difference of float16 numbers.
SMALLEST_MASS = 1e-6
"""Lower bound of the teacher's mass in reverse KL, per id of S and for the bucket."""


class Terms(NamedTuple):
    """Summands of a divergence at the entries [E] or at the bucket [T].

    Attributes:
        value: nats.
        slope: g, without constants.
    """

    value: Tensor
    slope: Tensor


class Masses(NamedTuple):
    """Probabilities at the entries [E] or at the bucket [T]; logarithms may be -inf.

    Attributes:
        p, log_p: the teacher's.
        q, log_q: the student's.
    """

    p: Tensor
    log_p: Tensor
    q: Tensor
    log_q: Tensor

    @classmethod
    def from_logs(cls, log_p: Tensor, log_q: Tensor) -> "Masses":
        """Computes the probabilities from their logarithms."""
        return cls(log_p.exp(), log_p, log_q.exp(), log_q)


def divergence_terms(masses: Masses, loss: LossConfig) -> Terms:
    """Summands and slopes of the divergence ``loss.kind``; finite where a mass is zero."""
    value, slope = DIVERGENCES[loss.kind](masses, loss)
    # The gradient is q * slope, and 0 * inf would be NaN.
    return Terms(value, torch.where(masses.q > 0, slope, 0.0))


def reverse_kl(masses: Masses, loss: LossConfig) -> Terms:
    """KL(q || p)."""
    log_ratio = masses.log_q - masses.log_p.clamp(min=math.log(SMALLEST_MASS))
    return Terms(xlog_ratio(masses.q, log_ratio), log_ratio)


def jsd(masses: Masses, loss: LossConfig) -> Terms:
    """Generalised Jensen-Shannon divergence: beta KL(p || M) + (1 - beta) KL(q || M)."""
    beta = loss.beta
    log_mixture = _log_mixture(masses, beta)
    log_ratio = masses.log_q - log_mixture
    teacher_kl = xlog_ratio(masses.p, masses.log_p - log_mixture)
    student_kl = xlog_ratio(masses.q, log_ratio)
    return Terms(beta * teacher_kl + (1.0 - beta) * student_kl, (1.0 - beta) * log_ratio)


def skew_kl(masses: Masses, loss: LossConfig) -> Terms:
    """KL(p || M), at most -log(skew)."""
    log_ratio = masses.log_p - _log_mixture(masses, loss.skew)
    return Terms(xlog_ratio(masses.p, log_ratio), (loss.skew - 1.0) * log_ratio.exp())


def tvd(masses: Masses, loss: LossConfig) -> Terms:
    """Total variation distance, at most 1."""
    difference = masses.q - masses.p
    return Terms(0.5 * difference.abs(), 0.5 * difference.sign())


def _log_mixture(masses: Masses, share: float) -> Tensor:
    """log(share p + (1 - share) q)."""
    return torch.logaddexp(masses.log_p + math.log(share), masses.log_q + math.log1p(-share))


def xlog_ratio(x: Tensor, log_ratio: Tensor) -> Tensor:
    """x * log_ratio, with 0 * log 0 = 0."""
    return torch.where(x > 0, x * log_ratio, 0.0)


DIVERGENCES: dict[str, Callable[[Masses, LossConfig], Terms]] = {
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "tvd": tvd,
}
