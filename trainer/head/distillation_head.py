"""The output head as a module: hidden states and labels in, one scalar and its parts out.

    head = DistillationHead.around(model.lm_head, loss=LossConfig(kind="forward_kl"))
    loss_sum, parts = head(hidden, targets)
    (loss_sum / parts["weight"]).backward()

What it computes, and without which tensors, is in `trainer.head.fused_head`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.train import LossConfig
from trainer.head.fused_head import LogitTransform, fused_distillation_loss
from trainer.losses.targets import SparseTargets


class DistillationHead(nn.Linear):
    """A student's lm_head, which computes a loss when it is given targets, logits otherwise.

    It takes the place of the model's own head and owns the same parameters, so that ZeRO-3, which
    gathers parameters around the forward of the module that owns them, gathers this weight as well,
    tied to the embedding or not. Names in the state dict do not change.

    Attributes:
        transform: what the model does to its logits after the head.
        loss: the target where a call names none.
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
        """A fresh head of H = `in_features` and V = `out_features`; see `around` for a model's."""
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
        """A head that shares the parameters of `linear`."""
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
        """Logits [..., V] of hidden [..., H]; with targets, see `fused_distillation_loss`.

        The logits are those of the matrix and bias alone: a model applies its own scale and soft
        cap after its head. The loss is of the transformed ones.
        """
        if targets is None:
            return super().forward(hidden)
        return fused_distillation_loss(
            hidden, self.weight, self.bias, targets, loss or self.loss, self.transform
        )
