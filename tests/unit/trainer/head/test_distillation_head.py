"""The fused head as a module, which takes the place of a linear layer."""

import torch

from tests.support.head_inputs import H, L, V, inputs
from trainer.config.train import LossConfig
from trainer.head.distillation_head import DistillationHead
from trainer.head.fused_head import LogitTransform, fused_distillation_loss


def test_head_module_gives_logits_or_loss_and_shares_parameters():
    hidden, _, _, targets = inputs(17, torch.float32)
    linear = torch.nn.Linear(H, V)
    head = DistillationHead.around(linear, LogitTransform())
    assert head.weight is linear.weight
    assert list(head.state_dict()) == ["weight", "bias"]
    torch.testing.assert_close(head(hidden), linear(hidden))
    with_loss = DistillationHead.around(linear, loss=LossConfig(kind="ghost"))
    assert with_loss(hidden, targets)[0].item() == head(hidden, targets, with_loss.loss)[0].item()
    total, _ = head(hidden.view(1, L, H), targets, LossConfig(kind="ghost"))
    expected, _ = fused_distillation_loss(
        hidden, linear.weight, linear.bias, targets, LossConfig(kind="ghost")
    )
    torch.testing.assert_close(total, expected)


def test_head_of_its_own_learns():
    hidden, _, _, targets = inputs(18, torch.float32)
    torch.manual_seed(0)
    head = DistillationHead(
        H, V, transform=LogitTransform(softcap=5.0), loss=LossConfig(kind="ghost")
    )
    before, parts = head(hidden, targets)
    (before / parts["weight"]).backward()
    with torch.no_grad():
        head.weight -= 0.1 * head.weight.grad
    assert head(hidden, targets)[0] < before
