"""Which teacher it is, and the tokenizers it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from labeler.config import TeacherConfig
from labeler.teacher_model.identity import (
    eos_ids,
    load_tokenizer,
    model_folder,
    resolve_dtype,
    resolve_head_dtype,
    teacher_identity,
)
from labeler.teacher_model.weights_digest import weights_digest
from schemas.errors import TeacherError, VocabularyError


@pytest.fixture
def model_copy(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def teacher(model: Path | str, **fields: object) -> TeacherConfig:
    return TeacherConfig.model_validate({"model": str(model), **fields})


def edit_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_identity_says_what_the_teacher_computes(tiny_model_dir: Path) -> None:
    identity = teacher_identity(teacher(tiny_model_dir))
    assert identity.vocab_size == 320
    assert identity.dtype == "float32"
    assert identity.head_dtype == "float32"
    assert identity.model_type == "llama"
    assert identity.quantization is None
    digests = [
        identity.weights_digest,
        identity.config_digest,
        identity.tokenizer_digest,
        identity.chat_template_digest,
    ]
    assert all(len(digest) == 32 for digest in digests)
    assert len(set(digests)) == 4


def test_identity_is_the_same_for_a_copy(tiny_model_dir: Path, model_copy: Path) -> None:
    edit_json(model_copy / "config.json", _name_or_path="elsewhere", transformers_version="9")
    assert teacher_identity(teacher(model_copy)) == teacher_identity(teacher(tiny_model_dir))


def test_each_part_moves_its_own_digest(tiny_model_dir: Path, model_copy: Path) -> None:
    before = teacher_identity(teacher(tiny_model_dir))
    edit_json(model_copy / "config.json", rms_norm_eps=1e-3)
    after = teacher_identity(teacher(model_copy))
    assert before.config_digest != after.config_digest
    assert before.weights_digest == after.weights_digest

    overridden = teacher_identity(
        teacher(tiny_model_dir, engine={"hf_overrides": {"rope_theta": 5000.0}})
    )
    assert overridden.config_digest != before.config_digest

    (model_copy / "chat_template.jinja").write_text("{{ messages }}")
    assert teacher_identity(teacher(model_copy)).chat_template_digest != before.chat_template_digest


def test_dtypes(tiny_model_dir: Path, model_copy: Path) -> None:
    rounded = teacher(tiny_model_dir, dtype="bfloat16", head_dtype="float32")
    assert (resolve_dtype(rounded), resolve_head_dtype(rounded)) == ("bfloat16", "float32")
    edit_json(model_copy / "config.json", dtype="bfloat16")
    assert resolve_head_dtype(teacher(model_copy)) == "bfloat16"
    content = json.loads((model_copy / "config.json").read_text())
    content.pop("dtype")
    (model_copy / "config.json").write_text(json.dumps(content))
    assert resolve_dtype(teacher(model_copy)) == "float32"
    with pytest.raises(TeacherError, match="int3"):
        resolve_dtype(teacher(tiny_model_dir, dtype="int3"))


def test_weights_digest_sees_training_and_not_sharding(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layer.{i}": torch.randn(200, 100, generator=generator) for i in range(3)}
    for name in ("whole", "split", "trained"):
        (tmp_path / name).mkdir()
    save_file(tensors, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
    for index, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, tmp_path / "split" / f"model-{index}.safetensors")
    save_file(
        {**tensors, "layer.1": tensors["layer.1"] + 1e-3}, tmp_path / "trained" / "m.safetensors"
    )
    whole, split, trained = (weights_digest(tmp_path / n) for n in ("whole", "split", "trained"))
    assert whole == split
    assert whole != trained


def test_weights_digest_refuses_a_truncated_checkpoint(model_copy: Path) -> None:
    file = model_copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(TeacherError, match="promises"):
        teacher_identity(teacher(model_copy))


def test_identity_refuses_a_missing_model() -> None:
    with pytest.raises(TeacherError, match="/nowhere/model does not exist"):
        model_folder(teacher("/nowhere/model"))
    with pytest.raises(TeacherError, match="there is no folder org/no-such-model"):
        model_folder(teacher("org/no-such-model"))


def test_identity_refuses_a_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TeacherError, match=r"has no weights \(\*\.safetensors\)"):
        model_folder(teacher(tmp_path))


def test_identity_refuses_an_unknown_architecture(model_copy: Path) -> None:
    edit_json(model_copy / "config.json", model_type="nobody-knows")
    with pytest.raises(TeacherError, match=r"config\.json cannot be used"):
        teacher_identity(teacher(model_copy))


def test_without_a_teacher_only_the_tokenizer_counts(tiny_model_dir: Path) -> None:
    config = TeacherConfig(backend="none", tokenizer=str(tiny_model_dir))
    identity = teacher_identity(config)
    assert identity.weights_digest == ""
    assert identity.vocab_size == 320
    assert identity.tokenizer_digest == teacher_identity(teacher(tiny_model_dir)).tokenizer_digest


def test_identity_refuses_a_folder_without_a_tokenizer(model_copy: Path) -> None:
    (model_copy / "tokenizer.json").unlink()
    with pytest.raises(TeacherError, match="no tokenizer can be loaded"):
        load_tokenizer(teacher(model_copy))


def test_vocabulary_refuses_ids_outside_the_model(model_copy: Path) -> None:
    tokenizer = load_tokenizer(teacher(model_copy))
    tokenizer.add_tokens(["<extra-0>", "<extra-1>"])
    tokenizer.save_pretrained(model_copy)
    with pytest.raises(VocabularyError, match=r"2 ids that .* the first 320 \('<extra-0>'\)"):
        load_tokenizer(teacher(model_copy))


def test_vocabulary_refuses_another_mapping_of_the_same_size(
    tiny_model_dir: Path, model_copy: Path
) -> None:
    path = model_copy / "tokenizer.json"
    content = json.loads(path.read_text())
    mapping = content["model"]["vocab"]
    mapping["a"], mapping["b"] = mapping["b"], mapping["a"]
    path.write_text(json.dumps(content))
    with pytest.raises(
        VocabularyError, match=r"2 tokens differ \(id \d+ is 'a' in the model but 'b'"
    ):
        load_tokenizer(teacher(tiny_model_dir, tokenizer=str(model_copy)))


def test_vocabulary_accepts_the_same_tokenizer_elsewhere(
    tiny_model_dir: Path, model_copy: Path
) -> None:
    assert len(load_tokenizer(teacher(tiny_model_dir, tokenizer=str(model_copy)))) == 320


def test_vocabulary_accepts_padding_and_refuses_others(model_copy: Path) -> None:
    edit_json(model_copy / "config.json", vocab_size=384)
    assert teacher_identity(teacher(model_copy)).vocab_size == 384
    edit_json(model_copy / "config.json", vocab_size=4096)
    with pytest.raises(VocabularyError, match="3776 unused ids are more than padding"):
        load_tokenizer(teacher(model_copy))


def test_ids_that_end_a_response(model_copy: Path) -> None:
    assert eos_ids(teacher(model_copy)) == (1,)
    (model_copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 4]}))
    assert eos_ids(teacher(model_copy)) == (1, 4)
