"""Training of adapters alone: without ZeRO and with all of it, interrupted, exported."""

import shutil
from pathlib import Path

import pytest
import torch

from schemas.errors import ConfigError
from schemas.spec import RecordSpec
from tests.support.rank_pool import train
from tests.support.training_runs import losses, make_config, make_view
from trainer.config.train import TrainConfig

SECTIONS = {
    "data": {"sequences_per_step": 3, "steps": 6},
    "checkpoint": {"every_steps": 3, "keep": 2},
}


def test_adapters_train_alike_with_and_without_zero(tmp_path: Path, tiny_model_dir: Path) -> None:
    """The losses agree; an interrupted run goes on; the export is the base with what was learned"""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(tiny_model_dir).get_vocab()
    view = make_view(tmp_path, RecordSpec(kind="topk", k=4), vocabulary)
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)

    def job(name: str, stage: int, num_workers: int = 2) -> TrainConfig:
        student = {"path": str(base), "config": {}, "tokenizer": "", "lora": {"rank": 4}}
        sections = {**SECTIONS, "student": student, "deepspeed": {"zero_stage": stage}}
        sections["ray"] = {"num_workers": num_workers}
        return make_config(tmp_path / name, view.url, "", **sections)

    train(job("plain", 0))
    expected = losses(tmp_path / "plain")
    run = tmp_path / "split"
    train(job("split", 3))
    assert losses(run) == pytest.approx(expected, abs=1e-5)
    assert names_saved(checkpoint(tmp_path / "plain", 6)) == {"lora_A", "lora_B"}

    (run / "summary.json").unlink()
    shutil.rmtree(checkpoint(run, 6))
    summary = train(job("split", 3, num_workers=1))
    assert summary.resumed_from_step == 3
    assert losses(run) == pytest.approx(expected, abs=1e-5)

    frozen = AutoModelForCausalLM.from_pretrained(base).state_dict()
    learned, info = AutoModelForCausalLM.from_pretrained(summary.exported, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    changed = {
        name for name, value in learned.state_dict().items() if not torch.equal(value, frozen[name])
    }
    assert changed == {name for name in frozen if "_proj" in name}
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "plain" / "student").state_dict()
    for name, value in learned.state_dict().items():
        assert torch.allclose(value, other[name], atol=1e-5), name

    (run / "summary.json").unlink()
    AutoModelForCausalLM.from_config(learned.config).save_pretrained(base)
    with pytest.raises(ConfigError, match="restore the base"):
        train(job("split", 3))


def checkpoint(run: Path, step: int) -> Path:
    return next((run / "checkpoints").glob(f"step_{step}*"))


def names_saved(folder: Path) -> set[str]:
    """What kinds of weights are in the file of the model's states."""
    states = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)
    return {name.split(".")[-3] for name in states["module"]}
