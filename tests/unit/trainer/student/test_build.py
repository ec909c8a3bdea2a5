from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from schemas.errors import StudentError
from tests.support.distillation_oracle import random_targets
from trainer.config.student import StudentConfig
from trainer.config.train import LossConfig
from trainer.head.distillation_head import DistillationHead
from trainer.head.fused_head import fused_distillation_loss
from trainer.student.build import (
    StudentWithHead,
    build_student,
    check_student,
    hidden_states,
    install_head,
    load_model,
    output_logits,
)

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def random_config(tokenizer: Path, seed: int = 0, **fields: Any) -> StudentConfig:
    config = {"model_type": "llama", **SMALL, **fields}
    return StudentConfig(config=config, tokenizer=str(tokenizer), seed=seed)


def architecture(model_type: str, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SMALL, "vocab_size": 64, **fields})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_student_is_a_function_of_its_seed(tiny_model_dir):
    torch.manual_seed(1)
    first, tokenizer = build_student(random_config(tiny_model_dir))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again, _ = build_student(random_config(tiny_model_dir))
    other, _ = build_student(random_config(tiny_model_dir, seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.training
    assert first.config.vocab_size == len(tokenizer.get_vocab())
    assert (first.config.bos_token_id, first.config.eos_token_id) == (0, 1)


def test_bfloat16_students_are_the_float32_ones_rounded(tiny_model_dir):
    config = random_config(tiny_model_dir)
    full, _ = build_student(config)
    half, _ = build_student(config.model_copy(update={"dtype": "bfloat16"}))
    assert half.dtype == torch.bfloat16
    assert torch.equal(full.lm_head.weight.bfloat16(), half.lm_head.weight)
    # As in a student that is loaded: positions would be others after the export.
    assert all(map(torch.equal, full.buffers(), half.buffers()))


def test_checkpoint_is_loaded_with_its_own_tokenizer(tiny_model_dir):
    model, tokenizer = build_student(StudentConfig(path=str(tiny_model_dir)))
    assert model.config.vocab_size == len(tokenizer.get_vocab()) == 320
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("tied", [True, False])
def test_student_gives_the_loss_of_its_own_logits(tiny_model_dir, tied, rng):
    model, _ = build_student(random_config(tiny_model_dir, tie_word_embeddings=tied))
    names = list(model.state_dict())
    targets = random_targets(rng, 12, model.config.vocab_size, 20)
    input_ids = torch.from_numpy(rng.integers(0, 300, (2, 10)))
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]] * 2)
    loss = LossConfig(kind="ghost", alpha=0.5)

    output = model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    logits = output.logits.flatten(0, 1)
    expected, _ = fused_distillation_loss(logits, torch.eye(320), None, targets, loss)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    student = StudentWithHead(model)
    total, _ = student(input_ids, position_ids, targets, loss)
    total.backward()
    torch.testing.assert_close(total, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == names
    assert isinstance(model.lm_head, DistillationHead)


def test_gradient_checkpointing_changes_nothing(tiny_model_dir, rng):
    targets = random_targets(rng, 6, 320, 10)
    input_ids = torch.from_numpy(rng.integers(0, 300, (1, 10)))
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    results = []
    for checkpointing in (False, True):
        student = StudentWithHead(build_student(random_config(tiny_model_dir))[0], checkpointing)
        total, _ = student(input_ids, position_ids, targets, LossConfig(kind="ghost"))
        total.backward()
        results.append((total, student.model.model.embed_tokens.weight.grad))
        assert student.model.is_gradient_checkpointing == checkpointing
    torch.testing.assert_close(results[0], results[1])


def test_exported_student_is_an_ordinary_checkpoint(tiny_model_dir, tmp_path):
    model, _ = build_student(StudentConfig(path=str(tiny_model_dir)))
    student = StudentWithHead(model)
    student.model.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), "float32")
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(again(tokens).logits, model.eval()(tokens).logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2"])
def test_packed_documents_are_as_if_alone(model_type, attention, rng):
    model = architecture(model_type, head_dim=16)
    model.set_attn_implementation(attention)
    documents = [torch.from_numpy(rng.integers(0, 64, (1, n))) for n in (7, 1, 12)]
    positions = [torch.arange(d.shape[1])[None] for d in documents]
    with torch.no_grad():
        packed = hidden_states(model, torch.cat(documents, 1), torch.cat(positions, 1))
        alone = torch.cat(
            [hidden_states(model, d, p) for d, p in zip(documents, positions, strict=True)], 1
        )
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {}),
        ("gemma2", {"head_dim": 16, "final_logit_softcapping": 1.5}),
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("qwen2", {"tie_word_embeddings": True}),
    ],
)
def test_logit_transforms_of_architectures_are_known(model_type, fields):
    model = architecture(model_type, **fields)
    check_student(model)
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        hidden = hidden_states(model, tokens, torch.arange(9)[None])
        torch.testing.assert_close(
            output_logits(model, hidden), model(tokens).logits, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_logits_that_need_more_than_a_head_are_refused(tiny_model_dir, attention):
    """Also for a kernel that a CPU does not have."""
    model, _ = build_student(StudentConfig(path=str(tiny_model_dir)))
    model.config._attn_implementation = attention
    check_student(model)
    whole = model.forward

    def with_bias(**inputs: Any) -> Any:
        output = whole(**inputs)
        output.logits = output.logits + torch.arange(320)
        return output

    model.forward = with_bias
    with pytest.raises(StudentError, match="more than a head"):
        check_student(model)
    assert model.config._attn_implementation == attention
    assert model.training


def test_attention_across_documents_is_refused():
    model = architecture("gpt2", n_embd=32, n_layer=2, n_head=2)
    mixing = model.base_model.forward
    model.base_model.forward = lambda *args, **inputs: mixing(
        *args, **{**inputs, "position_ids": None}
    )
    with pytest.raises(StudentError, match="attend to each other"):
        check_student(model)


def test_adapters_on_the_head_are_refused(tiny_model_dir):
    model, _ = build_student(StudentConfig(path=str(tiny_model_dir)))

    class Adapted(nn.Linear):
        pass

    model.lm_head.__class__ = Adapted
    with pytest.raises(StudentError, match="output head is a Adapted"):
        install_head(model)


def test_student_names_a_missing_folder(tmp_path, tiny_model_dir):
    missing = tmp_path / "nothing"
    with pytest.raises(StudentError, match=r"no tokenizer at .*nothing: the folder does not exist"):
        build_student(StudentConfig(path=str(missing)))
    with pytest.raises(StudentError, match=r"no model at .*nothing"):
        build_student(StudentConfig(path=str(missing), tokenizer=str(tiny_model_dir)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(StudentError, match="cannot be used"):
        build_student(StudentConfig(path=str(tmp_path / "empty"), tokenizer=str(tiny_model_dir)))


def test_student_refuses_a_checkpoint_without_all_weights(tmp_path, tiny_model_dir):
    from safetensors.torch import save_file

    model = load_model(str(tiny_model_dir), "float32")
    model.config.save_pretrained(tmp_path)
    state = {k: v for k, v in model.state_dict().items() if "layers.1" not in k and k != "lm_head"}
    state.pop("lm_head.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StudentError, match=r"lack 9 tensors .* model.layers.1.input_layernorm"):
        load_model(str(tmp_path), "float32")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "lama"}, "did you mean llama?"),
        (
            {"hiden_size": 3},
            "hiden_size: a llama config has no such field; did you mean hidden_size?",
        ),
        ({"hidden_size": 33}, "not a multiple of the number of attention heads"),
        ({"vocab_size": 100}, "vocab_size = 100 is less than the 320 ids"),
    ],
)
def test_bad_student_config_says_what_is_wrong(tiny_model_dir, fields, message):
    with pytest.raises(StudentError) as error:
        build_student(random_config(tiny_model_dir, **fields))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
