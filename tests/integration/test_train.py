"""Training on real Ray Train and DeepSpeed: exact on any split, and after any interruption."""

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schemas.errors import ConfigError, DamagedError, StudentError
from schemas.spec import RecordSpec
from schemas.views.view import View
from tests.support.rank_pool import train
from tests.support.teacher_requests import ENGINE, label, labelled
from tests.support.teacher_requests import config as teacher_config
from tests.support.training_faults import Trial, loss_difference, samples, step_of
from tests.support.training_runs import back_to_step, losses, make_config, make_view
from trainer.config.train import TrainConfig
from trainer.run.launch import run_train_job
from trainer.run_folder import TrainSummary

pytestmark = pytest.mark.usefixtures("ray_session")

# Three lanes on two workers: one of them has a micro-batch that weighs nothing in every step.
STEPS = 24
SECTIONS: dict[str, dict[str, Any]] = {
    # Wide enough for vLLM's CPU kernels.
    "student": {
        "config": {
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        }
    },
    "data": {"sequences_per_step": 3, "steps": STEPS},
    "schedule": {"kind": "constant", "warmup_steps": 2},
    "ray": {"num_workers": 2},
    "checkpoint": {"every_steps": 4, "keep": 3},
    "log": {"rows": True},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.tiny_model import make_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> View:
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(tokenizer).get_vocab()
    return make_view(tmp_path_factory.mktemp("view"), RecordSpec(kind="topk", k=4), vocabulary)


@pytest.fixture(scope="module")
def reference(
    tmp_path_factory: pytest.TempPathFactory, view: View, tokenizer: Path
) -> tuple[Path, TrainSummary]:
    """An undisturbed run of two workers."""
    run = tmp_path_factory.mktemp("reference") / "run"
    return run, run_train_job(config(run, view, tokenizer))


def config(run: Path, view: View, tokenizer: Path, **changes: dict[str, Any]) -> TrainConfig:
    sections = {name: dict(values) for name, values in SECTIONS.items()}
    for name, values in changes.items():
        sections[name] = {**sections.get(name, {}), **values}
    return make_config(run, view.url, str(tokenizer), **sections)


def test_run_leaves_curve_summary_and_checkpoints(
    reference: tuple[Path, TrainSummary], view: View, tokenizer: Path
) -> None:
    run, summary = reference
    assert summary.steps == STEPS == len(losses(run))
    assert summary.final_loss == losses(run)[-1]
    assert summary.resumed_from_step == 0
    kept = sorted(step_of(path) for path in (run / "checkpoints").iterdir())
    assert kept == [16, 20, 24]


def test_pool_trains_to_the_bit_as_ray_train_does(
    tmp_path: Path, reference: tuple[Path, TrainSummary], view: View, tokenizer: Path
) -> None:
    """So what other tests find out about runs on the pool holds for Ray Train."""
    run = tmp_path / "run"
    summary = train(config(run, view, tokenizer))
    assert losses(run) == losses(reference[0])
    assert samples(run) == samples(reference[0])
    assert_same_weights(Path(summary.exported), Path(reference[1].exported), tolerance=0.0)


def test_exported_student_loads_as_an_ordinary_model(
    reference: tuple[Path, TrainSummary], view: View
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(reference[1].exported)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == view.label_sets[0].vocabulary()
    assert model.generate(max_new_tokens=2).shape[1] >= 2
    card = (folder / "README.md").read_text()
    assert view.view_hash in card
    assert view.label_sets[0].fingerprint in card


def test_exported_student_has_the_same_logits_in_transformers_and_vllm(
    reference: tuple[Path, TrainSummary], view: View
) -> None:
    """Of the whole vocabulary, at every position; as log-probabilities, which both normalise."""
    import torch
    from transformers import AutoModelForCausalLM

    from labeler.teachers.factory import make_teacher

    folder = Path(reference[1].exported)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    everything = RecordSpec(kind="topk", k=model.config.vocab_size)
    engine = {**ENGINE, "max_logprobs": everything.k}
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, everything.k, length, dtype=np.int32) for length in (2, 33, 120)]
    spans = [np.array([1, len(row)], np.int32) for row in tokens]
    teacher = make_teacher(teacher_config(folder, engine=engine), everything)
    try:
        results = [labelled(result) for result in label(teacher, tokens, spans)]
    finally:
        teacher.close()
    for row, result in zip(tokens, results, strict=True):
        with torch.no_grad():
            logits = model(torch.from_numpy(row).long()[None]).logits[0, :-1]
        expected = torch.log_softmax(logits.double(), -1).numpy()
        found = np.empty_like(expected)
        np.put_along_axis(found, result.entry_ids, result.entry_logprobs, axis=1)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
        assert expected.std() > 0.1, "the student has learned nothing that could differ"


def test_run_on_draws_says_where_the_loss_is_approximate(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    record = RecordSpec(kind="threshold", tau=0.1, temperatures=(2.0,), draw_temperature=1.0)
    drawn = make_view(tmp_path, record, AutoTokenizer.from_pretrained(tokenizer).get_vocab())
    short = {"data": {"sequences_per_step": 3, "steps": 6}, "ray": {"num_workers": 1}}
    exact = {"kind": "forward_kl", "alpha": 0.7}
    summary = train(config(tmp_path / "exact", drawn, tokenizer, loss=exact, **short))
    card = Path(summary.exported, "README.md").read_text()
    assert "approximated" not in capsys.readouterr().err + card
    warm = {**exact, "temperature": 2.0}
    with pytest.raises(ConfigError, match=r"exact at 1\.0"):
        train(config(tmp_path / "warm", drawn, tokenizer, loss=warm, **short))
    allowed = {**warm, "approximate_temperature": True}
    summary = train(config(tmp_path / "warm", drawn, tokenizer, loss=allowed, **short))
    for text in (capsys.readouterr().err, Path(summary.exported, "README.md").read_text()):
        assert "approximated by the ghost objective" in text
    assert losses(tmp_path / "exact") != losses(tmp_path / "warm")


def test_finished_run_returns_its_summary(
    reference: tuple[Path, TrainSummary], view: View, tokenizer: Path, capsys: Any
) -> None:
    run, summary = reference
    assert run_train_job(config(run, view, tokenizer)) == summary
    assert "is already finished" in capsys.readouterr().err


def test_run_folder_refuses_another_configuration(
    reference: tuple[Path, TrainSummary], view: View, tokenizer: Path
) -> None:
    changed = config(reference[0], view, tokenizer, optimizer={"lr": 0.5})
    with pytest.raises(ConfigError, match=r"optimizer\.lr \(found 0\.01, now 0\.5\).*run="):
        run_train_job(changed)


def test_run_refuses_a_checkpoint_of_another_packer(
    tmp_path: Path, reference: tuple[Path, TrainSummary], view: View, tokenizer: Path
) -> None:
    run = back_to_step(reference[0], tmp_path / "run", STEPS)
    manifest = next((run / "checkpoints").glob("*/manifest.json"))
    saved = json.loads(manifest.read_text())
    saved["progress"]["loader"]["packer_version"] = 1
    manifest.write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match=r"packer_version = 1, but here it is 2.*run="):
        train(config(run, view, tokenizer))


@pytest.mark.parametrize(
    ("num_workers", "num_steps", "deepspeed", "tolerance"),
    [
        (1, STEPS, {"zero_stage": 0}, 1e-5),
        (2, STEPS, {"zero_stage": 2, "gradient_checkpointing": True}, 1e-5),
        (2, 8, {"zero_stage": 3}, 1e-5),
        (2, 8, {"zero_stage": 1, "precision": "bf16"}, 2e-2),
    ],
)
def test_losses_are_equal_for_any_workers_and_zero_stage(
    tmp_path: Path,
    reference: tuple[Path, TrainSummary],
    view: View,
    tokenizer: Path,
    num_workers: int,
    num_steps: int,
    deepspeed: dict[str, Any],
    tolerance: float,
) -> None:
    job = config(
        tmp_path / "run",
        view,
        tokenizer,
        data={"steps": num_steps, "micro_batch_size": num_workers},
        ray={"num_workers": num_workers},
        deepspeed=deepspeed,
    )
    summary = train(job)
    expected = losses(reference[0])[:num_steps]
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=tolerance)
    assert (Path(summary.exported) / "model.safetensors").exists()
    if num_steps == STEPS:
        assert_same_weights(Path(summary.exported), Path(reference[1].exported))


def test_native_optimizer_trains_the_same(
    tmp_path: Path, reference: tuple[Path, TrainSummary], view: View, tokenizer: Path
) -> None:
    """The same optimizer, from the native section, trains the same."""
    shape = {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    native = {"optimizer": {"type": "AdamW", "params": {**shape, "torch_adam": True}}}
    job = config(
        tmp_path / "run",
        view,
        tokenizer,
        data={"steps": 8},
        optimizer={"lr": 1e-4},  # the default: the native section says it all
        deepspeed={"zero_stage": 2, "native": native},
    )
    train(job)
    assert losses(tmp_path / "run") == pytest.approx(losses(reference[0])[:8], abs=1e-5)


def test_run_survives_kills_and_damage(
    tmp_path: Path, reference: tuple[Path, TrainSummary], view: View, tokenizer: Path
) -> None:
    """A short version of tests/fault/training, without the faults that take a moment to be met."""
    seed = int(os.environ.get("TUTELAGE_FAULT_SEED", random.randrange(10**6)))
    print(f"TUTELAGE_FAULT_SEED={seed}")
    trial = Trial("short", config(tmp_path / "run", view, tokenizer), random.Random(seed))
    for what, after_step in (("rank", 9), ("checkpoint", 10)):
        trial.fault(what, after_step)
    summary = trial.finish()
    assert summary.steps == STEPS
    assert samples(trial.run) == samples(reference[0])
    assert loss_difference(trial.run, reference[0]) == 0.0
    assert_same_weights(Path(summary.exported), Path(reference[1].exported))


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_run_resumes_on_another_number_of_workers(
    tmp_path: Path,
    reference: tuple[Path, TrainSummary],
    view: View,
    tokenizer: Path,
    zero_stage: int,
    capsys: Any,
) -> None:
    short: dict[str, Any] = {
        "data": {"steps": 6},
        "deepspeed": {"zero_stage": zero_stage},
        "log": {"rows": True},
    }
    whole = tmp_path / "whole"
    train(config(whole, view, tokenizer, **short))
    expected = losses(reference[0])[:6]
    assert losses(whole) == pytest.approx(expected, abs=1e-5)
    run = back_to_step(whole, tmp_path / "run", 4)
    alone = config(run, view, tokenizer, **short, ray={"num_workers": {"min": 1, "max": 1}})
    summary = train(alone)
    assert (summary.world_size, summary.resumed_from_step) == (1, 4)
    assert "now on 1 worker instead of 2" in capsys.readouterr().err
    assert losses(run) == pytest.approx(expected, abs=1e-5)
    assert (run / "rows.jsonl").read_text() == (whole / "rows.jsonl").read_text()


def test_run_stops_on_divergence(tmp_path: Path, view: View, tokenizer: Path) -> None:
    job = config(
        tmp_path / "run",
        view,
        tokenizer,
        optimizer={"lr": 1e30},
        schedule={"warmup_steps": 0},
        deepspeed={"gradient_clipping": 0.0},
        ray={"max_failures": 1},  # the workers that Ray Train restarts end at once
    )
    with pytest.raises(StudentError, match=r"of step \d+ is (nan|inf).*no checkpoint") as error:
        run_train_job(job)
    assert str(tmp_path / "run" / "bad_batch.json") in str(error.value)


def test_run_names_rows_whose_loss_is_nan(tmp_path: Path, view: View, tokenizer: Path) -> None:
    """One embedding of the student is no number; only rows with its token are to blame."""
    from trainer.run.bad_batch import BadBatch

    run, token = tmp_path / "run", rare_token(view)
    spoil_embedding(tmp_path / "spoilt", tokenizer, token)
    student = {"path": str(tmp_path / "spoilt"), "config": {}}
    job = config(run, view, tokenizer, student=student, checkpoint={"every_steps": 1})
    message = r"the loss of step \d+ is nan, as it is for \d+ of \d+ rows run on their own"
    with pytest.raises(StudentError, match=message) as error:
        train(job)
    found = BadBatch.model_validate_json((run / "bad_batch.json").read_bytes())
    culprits = [row.view_row for row in found.rows if row.is_finite is False]
    assert sorted(culprits) == sorted(
        row.view_row for row in found.rows if token in tokens_of(view, row.view_row)
    )
    assert 0 < len(culprits) < len(found.rows)
    first = found.rows[0]
    assert view.table["row_key"][first.view_row].as_py().hex() == first.row_key
    assert f"row {first.view_row} of the view (shard {first.shard}" in str(error.value)
    assert len(losses(run)) == found.step - 1
    assert Path(found.checkpoint).parent == run / "checkpoints"
    assert step_of(Path(found.checkpoint)) == found.step - 1
    assert found.checkpoint in str(error.value)


def test_run_names_the_shard_of_a_flipped_byte(tmp_path: Path, view: View, tokenizer: Path) -> None:
    damaged = make_view(tmp_path, RecordSpec(kind="topk", k=4), view.label_sets[0].vocabulary())
    shard = next((tmp_path / "labels" / "shards").iterdir())
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DamagedError, match=re.escape(shard.name)) as error:
        train(config(tmp_path / "run", damaged, tokenizer))
    assert "\n" not in str(error.value)


def test_run_refuses_a_truncated_shard_before_it_starts(
    tmp_path: Path, view: View, tokenizer: Path
) -> None:
    damaged = make_view(tmp_path, RecordSpec(kind="topk", k=4), view.label_sets[0].vocabulary())
    shard = next((tmp_path / "labels" / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(DamagedError, match=re.escape(shard.name)):
        run_train_job(config(tmp_path / "run", damaged, tokenizer))


def tokens_of(view: View, row: int) -> list[int]:
    return view.label_sets[0].read_rows(view.table.slice(row, 1)).token_ids.tolist()


def rare_token(view: View) -> int:
    """A token that stands in two rows."""
    rows = [set(tokens_of(view, row)) for row in range(view.num_rows)]
    return next(token for token in range(10, 320) if sum(token in row for row in rows) == 2)


def spoil_embedding(folder: Path, tokenizer: Path, token: int) -> None:
    """Writes a student in which the embedding of one token is no number."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=320, **shape, **heads))
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("nan")
    model.save_pretrained(folder)


def assert_same_weights(found: Path, expected: Path, tolerance: float = 1e-5) -> None:
    import torch
    from safetensors.torch import load_file

    weights = load_file(found / "model.safetensors")
    reference = load_file(expected / "model.safetensors")
    assert weights.keys() == reference.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(
            weight, reference[name], rtol=tolerance, atol=tolerance, msg=name
        )
