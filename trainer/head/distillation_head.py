"""The output head as a module: maps hidden states and labels to the loss and its parts.

    head = DistillationHead.around(model.lm_head, loss=LossConfig(kind="forward_kl"))
    loss_sum, parts = head(hidden, targets)
    (loss_sum / parts["weight"]).backward()

`trainer.head.fused_head` describes the computation.

Shapes: H hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.train import LossConfig
from trainer.head.fused_head import LogitTransform, fused_distillation_loss
from trainer.losses.targets import SparseTargets


class DistillationHead(nn.Linear):
    """A student's lm_head that computes a loss if given targets, and logits otherwise.

    It replaces the model's own head and owns the same parameters. ZeRO-3 gathers parameters around
    the forward of the module that owns them, and so gathers this weight too, whether or not it is
    tied to the embedding. Names in the state dict do not change.

    Attributes:
        transform: applied to the model's logits after the head.
        loss: default of `forward`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        transform: LogitTransform | None = None,
        loss: LossConfig | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Creates a head with H = `in_features`, V = `out_features`; see also `around`."""
        super().__init__(in_features, out_features, bias, device, dtype)
        self.transform = transform or LogitTransform()
        self.loss = loss or LossConfig()

    @classmethod
    def around(
        cls,
        linear: nn.Linear,
        transform: LogitTransform | None = None,
        loss: LossConfig | None = None,
    ) -> "DistillationHead":
        """Creates a head that shares the parameters of `linear`."""
        has_bias = linear.bias is not None
        head = cls(
            linear.in_features,
            linear.out_features,
            has_bias,
            transform=transform,
            loss=loss,
            device="meta",
        )
        head.weight, head.bias = linear.weight, linear.bias
        return head

    def forward(
        self,
        hidden: Tensor,
        targets: SparseTargets | None = None,
        loss: LossConfig | None = None,
    ) -> Any:
        """Logits [..., V] of hidden [..., H], or the loss of `fused_distillation_loss`.

        The logits come from matrix and bias alone, since a model applies its scale and soft cap
        after its head. The loss applies both.
        """
        if targets is None:
            return super().forward(hidden)
        return fused_distillation_loss(
            hidden, self.weight, self.bias, targets, loss or self.loss, self.transform
        )
