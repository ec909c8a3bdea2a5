"""Runs optimizer steps on one rank, with exact means over labels for any split of the batch.

The loss of a global step is the mean over the labels of all ranks and micro-batches. Their total
weight N is all-reduced before the first backward pass. Each micro-batch then runs
``backward(W * loss_sum / N)``: the number of ranks W undoes DeepSpeed's mean over ranks, and
``scale_wrt_gas=False`` prevents a second division by the number of micro-batches. So the gradient
depends neither on the split into micro-batches nor on the number of workers.

Needs a process group and an engine, but not Ray.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from trainer.config.train import LossConfig, TrainConfig
from trainer.data.loader import MicroBatch, StepBatch
from trainer.engine.deepspeed_engine import gradient_norm
from trainer.engine.guards import BadStep, Guard


@dataclass(frozen=True)
class StepResult:
    """Result of one global step, over all ranks.

    Attributes:
        loss, ce, kl: weighted sums over the labels, nats; see `trainer.head.fused_head`.
        weight: total weight of the labels.
        grad_norm: global gradient norm before clipping.
        warning: the guard's warning, usually empty.
    """

    loss: float
    ce: float
    kl: float
    weight: float
    grad_norm: float
    warning: str


class TrainStep:
    """Runs global steps. Collective: every rank calls it with its part of the same step."""

    def __init__(self, engine: Any, config: TrainConfig, guard: Guard) -> None:
        """
        Args:
            engine: from ``trainer.engine.deepspeed_engine.build_engine``.
            guard: checks the loss and the gradient of every step.
        """
        self._engine, self._config, self._guard = engine, config, guard
        self._world_size = dist.get_world_size()

    def run(self, batch: StepBatch, step: int, lr: float) -> StepResult:
        """Runs forward, backward, and the optimizer's step.

        Args:
            batch: this rank's part.
            step: number of the step, counted from 1.
            lr: learning rate of every parameter group.

        Raises:
            BadStep: on every rank, if the loss or the gradient is non-finite or the guard stops at
                a spike. The loss is checked before the optimizer's step; the gradient too, if its
                norm is known by then (float32 without ZeRO).
        """
        engine = self._engine
        weight = self.sum_over_ranks([sum(m.weight for m in batch.micro_batches)])[0]
        scale = self._world_size / weight if weight else 0.0
        parts: list[torch.Tensor] = []
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        for number, micro_batch in enumerate(batch.micro_batches, start=1):
            loss_sum, sums = self.forward(micro_batch)
            engine.backward(loss_sum * scale, scale_wrt_gas=False)
            parts.append(torch.stack([sums["loss"], sums["ce"], sums["kl"]]).double())
            if number < len(batch.micro_batches):
                engine.step()  # only counts; DeepSpeed updates at the last micro-batch
        loss, ce, kl = self.sum_over_ranks(torch.stack(parts).sum(0))
        try:
            warning = self._guard.check_loss(step, loss, weight)
            norm, more = self._update(step)
        except BadStep as bad:
            bad.micro_losses = [float(part[0]) for part in parts]
            raise
        return StepResult(loss, ce, kl, weight, norm, warning or more)

    def forward(
        self, batch: MicroBatch, loss: LossConfig | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Computes the loss of one micro-batch and its parts; see ``StudentWithHead.forward``.

        Args:
            loss: the loss to compute; None: the training loss.
        """
        device = self._engine.device
        input_ids = batch.input_ids.to(device, non_blocking=True)
        position_ids = batch.position_ids.to(device, non_blocking=True)
        if self._config.student.attn_implementation == "flash_attention_2":
            # Its kernel finds documents by position ids only within a single sequence.
            input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
        targets = batch.targets.to(device, non_blocking=True)
        result: tuple[torch.Tensor, dict[str, torch.Tensor]] = self._engine(
            input_ids, position_ids, targets, loss or self._config.loss
        )
        return result

    @contextlib.contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Puts the student into evaluation mode while the block runs."""
        self._engine.eval()
        try:
            yield
        finally:
            self._engine.train()

    def _update(self, step: int) -> tuple[float, str]:
        """Steps the optimizer. Returns the gradient norm and the guard's warning."""
        norm = gradient_norm(self._engine)
        if norm is not None:
            warning = self._guard.check_gradient(step, norm)
            self._engine.step()
            return norm, warning
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        return norm, self._guard.check_gradient(step, norm)

    def sum_over_ranks(self, values: list[float] | torch.Tensor) -> list[float]:
        """Sums a few numbers over all ranks in float64. Collective."""
        total = torch.as_tensor(values, dtype=torch.float64, device=self._engine.device)
        dist.all_reduce(total)
        return total.tolist()
