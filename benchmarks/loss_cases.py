"""The losses that `benchmarks.loss` measures, on the same hidden states and head.

Teachers are random Zipf distributions (exponents 1 to 2, other ids at every position), labelled by
the labeller's own arithmetic.

Shapes: T positions, V vocabulary, H hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.demo_positions import Positions
from benchmarks.estimators import labelled
from benchmarks.records import threshold_tau
from schemas.spec import RecordSpec
from trainer.config.train import LossConfig
from trainer.head.fused_head import fused_distillation_loss
from trainer.losses.targets import SparseTargets

TEMPERATURE = 2.0
CROSS_ENTROPY = "fused_ce"
DENSE = "dense_kl"
CASES = (
    CROSS_ENTROPY,
    "threshold_t1",
    "topk_t1",
    "threshold_t2",
    "topk_t2",
    "dense_ce",
    DENSE,
)
"""``_t1``, ``_t2``: distillation temperature 1, 2. Dense cases hold all logits at once."""


@dataclass(frozen=True)
class Shape:
    """Positions, vocabulary and hidden size of one measurement."""

    num_tokens: int
    vocab_size: int
    hidden_size: int

    def __str__(self) -> str:
        return f"{self.num_tokens} x {self.vocab_size}, H = {self.hidden_size}"


class Inputs:
    """Hidden states [T, H] and weight [V, H] of one shape; labels are made by the cases."""

    def __init__(
        self, shape: Shape, device: str, dtype: torch.dtype, chunk_tokens: int | None
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(shape.num_tokens, shape.hidden_size, generator=generator)
        weight = torch.randn(shape.vocab_size, shape.hidden_size, generator=generator)
        self.hidden = hidden.to(device, dtype).requires_grad_()
        self.weight = weight.mul_(shape.hidden_size**-0.5).to(device, dtype).requires_grad_()
        self.token_ids = torch.randint(
            0, shape.vocab_size, (shape.num_tokens,), generator=generator
        )
        self._shape, self._chunk_tokens, self._generator = shape, chunk_tokens, generator
        self._device = torch.device(device)

    def case(self, name: str) -> Callable[[], Tensor]:
        """Prepares the labels or dense teacher of a case and returns its forward pass."""
        if name == "dense_ce":
            tokens = self.token_ids.to(self._device)
            return lambda: torch.nn.functional.cross_entropy(
                (self.hidden @ self.weight.t()).float(), tokens, reduction="sum"
            )
        if name == DENSE:
            teacher = torch.log_softmax(self._teacher_logits(), 1).to(self._device)
            return lambda: torch.nn.functional.kl_div(
                torch.log_softmax((self.hidden @ self.weight.t()).float(), 1),
                teacher,
                reduction="sum",
                log_target=True,
            )
        targets, loss = self._fused(name)
        return lambda: fused_distillation_loss(self.hidden, self.weight, None, targets, loss)[0]

    def _fused(self, name: str) -> tuple[SparseTargets, LossConfig]:
        if name == CROSS_ENTROPY:
            targets = self._labels(RecordSpec(kind="topk", k=1, entropy=False))
            return targets, LossConfig(kind="hard", chunk_tokens=self._chunk_tokens)
        kind, _, suffix = name.partition("_t")
        temperature = TEMPERATURE if suffix == "2" else 1.0
        stored = () if temperature == 1.0 else (temperature,)
        if kind == "topk":
            record = RecordSpec(kind="topk", k=64, temperatures=stored, entropy=False)
        else:
            tau = threshold_tau(torch.softmax(self._teacher_logits()[:256] / temperature, 1))
            record = RecordSpec(kind="threshold", tau=tau, temperatures=stored, entropy=False)
        loss = LossConfig(
            kind="ghost" if kind == "topk" else "forward_kl",
            temperature=temperature,
            chunk_tokens=self._chunk_tokens,
        )
        return self._labels(record), loss

    def _labels(self, record: RecordSpec) -> SparseTargets:
        positions = Positions(self._teacher_logits(), self.token_ids, self.weight)
        return labelled(positions, record, seed=0).to(self._device)

    def _teacher_logits(self) -> Tensor:
        """float32 [T, V], recomputed at every call: kept, it would count as held memory."""
        num_tokens, vocab_size = self._shape.num_tokens, self._shape.vocab_size
        generator = torch.Generator().manual_seed(1)
        exponents = 1.0 + torch.rand(num_tokens, 1, generator=generator)
        starts = torch.randint(0, vocab_size, (num_tokens, 1), generator=generator)
        ranks = torch.randperm(vocab_size, generator=generator)[None]
        ranks = (ranks + starts).remainder_(vocab_size).add_(1)
        return ranks.float().log_().mul_(-exponents)
