"""Adapters on a student: what they leave alone, what they refuse, and that merging is exact."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from schemas.errors import StudentError
from trainer.config.student import LoraConfig, StudentConfig
from trainer.student.build import StudentWithHead, build_student, hidden_states, output_logits
from trainer.student.lora import base_digest, merged, scalings

TOKENS = torch.tensor([[5, 6, 7, 8, 9]])
POSITIONS = torch.arange(5)[None]


def student(folder: Path, **lora: object) -> torch.nn.Module:
    config = StudentConfig(path=str(folder), lora=LoraConfig.model_validate(lora))
    return build_student(config)[0]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return output_logits(model, hidden_states(model.eval(), TOKENS, POSITIONS))


def disturb(model: torch.nn.Module, seed: int = 7) -> None:
    """Gives every adapter an effect."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)


def test_adapters_start_without_effect_and_alone_are_trained(tiny_model_dir: Path) -> None:
    plain = build_student(StudentConfig(path=str(tiny_model_dir)))[0]
    adapted = student(tiny_model_dir)
    assert torch.equal(logits(adapted), logits(plain))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 7  # A and B, two layers, seven matrices in each
    assert all(".lora_" in name for name in trained)
    disturb(adapted)
    assert not torch.allclose(logits(adapted), logits(plain), atol=1e-3)


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_merging_gives_the_same_logits_under_the_same_names(
    tiny_model_dir: Path, rank_stabilised: bool
) -> None:
    lora = {"rank": 4, "alpha": 6.0, "rank_stabilised": rank_stabilised}
    adapted = student(tiny_model_dir, target_modules=["q_proj", "down_proj"], **lora)
    disturb(adapted)
    plain = build_student(StudentConfig(path=str(tiny_model_dir)))[0]
    whole = merged(adapted.state_dict(), scalings(adapted))
    assert whole.keys() == plain.state_dict().keys()
    plain.load_state_dict(whole)
    assert torch.allclose(logits(plain), logits(adapted), atol=1e-5)


def test_adapters_are_a_function_of_the_seed(tiny_model_dir: Path) -> None:
    one, other = student(tiny_model_dir), student(tiny_model_dir)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_frozen_head_gets_no_gradient(tiny_model_dir: Path) -> None:
    import numpy as np

    from tests.support.distillation_oracle import random_targets
    from trainer.config.train import LossConfig

    whole = StudentWithHead(student(tiny_model_dir))
    targets = random_targets(np.random.default_rng(0), 3, 320, 5)
    loss, _ = whole(TOKENS, POSITIONS, targets, LossConfig(kind="ghost"))
    loss.backward()
    for name, parameter in whole.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in name), name


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["lm_head", "q_proj"], "output head"),
        (["embed_tokens"], "embedding"),
        (["no_such_layer"], "no_such_layer"),
    ],
)
def test_layers_that_cannot_have_adapters_are_refused(
    tiny_model_dir: Path, targets: list[str], message: str
) -> None:
    with pytest.raises(StudentError, match=message):
        student(tiny_model_dir, target_modules=targets)


def test_base_digest_distinguishes_bases(tiny_model_dir: Path, tmp_path: Path) -> None:
    import shutil

    plain = build_student(StudentConfig(path=str(tiny_model_dir)))[0]
    assert base_digest(plain) == ""
    expected = base_digest(student(tiny_model_dir))
    assert base_digest(student(tiny_model_dir, rank=2)) == expected
    shutil.copytree(tiny_model_dir, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["model.norm.weight"][-1] += 1e-3
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    assert base_digest(student(tmp_path / "other")) != expected
