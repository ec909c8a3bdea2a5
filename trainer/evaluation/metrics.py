"""Metrics of a model over labelled positions, from full-vocabulary logits at temperature 1.

The KL to the teacher uses full distributions; cached entries would give only a lower bound.

Shapes: T positions, V vocabulary.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

NUM_BINS = 15


@dataclass
class Calibration:
    """Expected calibration error of the most probable token (Guo et al., arXiv 1706.04599).

    Confidences fall into 15 bins of equal width over (0, 1]. The error is the gap between a bin's
    mean confidence and accuracy, averaged over bins weighted by their number of positions.

    Attributes:
        counts, confidences, hits: [15] float64, sums per bin.
    """

    counts: Tensor = field(default_factory=lambda: torch.zeros(NUM_BINS, dtype=torch.float64))
    confidences: Tensor = field(default_factory=lambda: torch.zeros(NUM_BINS, dtype=torch.float64))
    hits: Tensor = field(default_factory=lambda: torch.zeros(NUM_BINS, dtype=torch.float64))

    def add(self, confidence: Tensor, hit: Tensor) -> None:
        """Adds positions.

        Args:
            confidence: [T], probability of the most probable token.
            hit: [T] bool, whether that token is the text's.
        """
        confidence = confidence.double().cpu()  # float32 sums lose digits over many positions
        # Bins are open below: a confidence of exactly k / 15 belongs to bin k.
        bins = (confidence * NUM_BINS).ceil().long().clamp_(1, NUM_BINS) - 1
        self.counts += torch.bincount(bins, minlength=NUM_BINS)
        self.confidences += torch.bincount(bins, confidence, NUM_BINS)
        self.hits += torch.bincount(bins, hit.double().cpu(), NUM_BINS)

    @property
    def error(self) -> float:
        """0 to 1; nan without positions."""
        if not self.counts.sum():
            return math.nan
        return float((self.confidences - self.hits).abs().sum() / self.counts.sum())


@dataclass
class Tally:
    """Sums of one model over the positions seen so far.

    Attributes:
        num_labels: positions.
        ce: cross-entropy with the text, nats.
        kl: KL(teacher || model), nats, over the shared ids.
        agreements: positions where model and teacher agree on the most probable token.
        hits: positions where the model's most probable token is the text's.
        calibration: calibration of the model's most probable token.
    """

    num_labels: int = 0
    ce: float = 0.0
    kl: float = 0.0
    agreements: int = 0
    hits: int = 0
    calibration: Calibration = field(default_factory=Calibration)

    def add(self, logits: Tensor, teacher: Tensor, token_ids: Tensor) -> None:
        """Adds positions.

        Args:
            logits: [T, V] float32, of the model; entry t predicts ``token_ids[t]``.
            teacher: [T, V'] float32. Where V differs from V' (padding ids), the KL is over the
                shared ids.
            token_ids: [T] int64, the text.
        """
        log_q = torch.log_softmax(logits, 1)
        confidence, top = log_q.max(1)
        hit = top == token_ids
        self.num_labels += len(token_ids)
        self.ce -= float(log_q.gather(1, token_ids[:, None]).double().sum())
        self.kl += float(kl_divergence(teacher, logits).double().sum())
        self.agreements += int((top == teacher.argmax(1)).sum())
        self.hits += int(hit.sum())
        self.calibration.add(confidence.exp(), hit)


def kl_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of each position, nats.

    Args:
        teacher: [T, V'] logits.
        student: [T, V] logits.

    Returns:
        [T], over the first min(V, V') ids, to which both distributions are normalised.
    """
    shared = min(teacher.shape[1], student.shape[1])
    log_p = torch.log_softmax(teacher[:, :shared], 1)
    log_q = torch.log_softmax(student[:, :shared], 1)
    p = log_p.exp()
    # The difference of logs may be infinite where p underflows to 0.
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(1)
