"""The library in loops that are not ours: the examples, run, against the trainer's own loss."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from schemas.spec import RecordSpec
from schemas.views.view import View
from tests.support import ROOT
from tests.support.tiny_model import make_tokenizer
from tests.support.training_runs import make_view
from trainer import DataConfig, LossConfig, StudentWithHead, ViewDataset

LOSS = LossConfig(kind="forward_kl", alpha=0.7)
DATA = DataConfig(max_tokens=64, sequences_per_step=4, micro_batch_size=2, steps=3)
LR = 1e-2


@pytest.fixture(scope="module")
def examples() -> Iterator[dict[str, ModuleType]]:
    """The example modules, which import each other by name as scripts of one folder do."""
    folder = str(ROOT / "examples" / "library")
    sys.path.insert(0, folder)
    import hf_trainer
    import own_loop
    import student

    yield {module.__name__: module for module in (hf_trainer, own_loop, student)}
    sys.path.remove(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> View:
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(tokenizer).get_vocab()
    record = RecordSpec(kind="threshold", tau=0.05)
    return make_view(tmp_path_factory.mktemp("view"), record, vocabulary)


def student_and_dataset(
    examples: dict[str, ModuleType], tokenizer: Path, view: View
) -> tuple[StudentWithHead, ViewDataset]:
    model, words = examples["student"].make_student(tokenizer, hidden_size=32)
    student = StudentWithHead(model.float())
    return student, ViewDataset(view.url, DATA, LOSS, model.config.vocab_size, words)


@pytest.fixture(scope="module")
def expected(
    examples: dict[str, ModuleType], tokenizer: Path, view: View
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights by the trainer's own loader, all micro-batches of a step at once."""
    from tests.support.training_runs import make_config
    from trainer.data.loader import Loader
    from trainer.data.row_order import LoaderState, read_row_table

    student, _ = student_and_dataset(examples, tokenizer, view)
    config = make_config(Path("run"), view.url, str(tokenizer))
    config = config.model_copy(update={"data": DATA, "loss": LOSS})
    start = LoaderState(view_hash=view.view_hash, seed=DATA.seed, epoch=0, step=0)
    vocab_size = student.model.config.vocab_size
    loader = Loader(config, view, read_row_table(view, DATA), start, 0, vocab_size)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR)
    losses = []
    for _ in range(DATA.steps or 0):
        batches = next(loader).micro_batches
        weight = sum(batch.weight for batch in batches)
        total = sum(student(b.input_ids, b.position_ids, b.targets, LOSS)[0] for b in batches)
        (total / weight).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach()) / weight)
    loader.close()
    return losses, student.model.state_dict()


def assert_same_weights(found: StudentWithHead, expected: dict[str, torch.Tensor]) -> None:
    for name, weight in found.model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_own_loop_trains_as_the_trainer_does(examples, tokenizer, view, expected, num_workers):
    student, dataset = student_and_dataset(examples, tokenizer, view)
    found = examples["own_loop"].train(student, dataset, LOSS, LR, num_workers)
    assert found == pytest.approx(expected[0], rel=1e-5)
    assert found[-1] < found[0]
    assert_same_weights(student, expected[1])


def test_hugging_face_trainer_trains_as_the_trainer_does(
    examples, tokenizer, view, expected, tmp_path
):
    from transformers import AutoModelForCausalLM, TrainingArguments

    student, dataset = student_and_dataset(examples, tokenizer, view)
    trainer = examples["hf_trainer"].DistillationTrainer(
        model=student,
        train_dataset=dataset,
        loss=LOSS,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=dataset.num_steps(),
            gradient_accumulation_steps=dataset.micro_batches_per_step,
            learning_rate=LR,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
    )
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(expected[0], abs=1e-4)
    trainer.save_model()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, weight in student.model.state_dict().items():
        torch.testing.assert_close(saved[name], weight)
