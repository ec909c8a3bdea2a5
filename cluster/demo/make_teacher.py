"""Trains the demo's teacher: `python -m cluster.demo.make_teacher` (half an hour on two cores).

Trains a byte-level BPE tokenizer and a small Llama on the teacher's part of the corpus only, the
model with this project's trainer on hard labels. The repository ships the result as
examples/teacher.
"""

import shutil
from pathlib import Path

from cluster.demo.corpus import write_corpus

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
CONFIGS = Path("examples/teacher_training")
MODEL = Path("examples/teacher")
RUN = Path("runs/teacher")


def make_tokenizer(corpus: Path, folder: Path) -> None:
    """Trains a byte-level BPE tokenizer on all Python files in `corpus`; saves it in `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in sorted(corpus.rglob("*.py"))], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )
    fast.save_pretrained(folder)


def keep_model(student: Path, folder: Path) -> None:
    """Copies an exported student to `folder` in bfloat16, which halves its size."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    shutil.copy(student / "README.md", folder / "README.md")


def main() -> None:
    """Writes the corpus, trains the tokenizer, tokenises, trains the model and exports it."""
    from labeler.config import LabelConfig
    from labeler.run.job import run_label_job
    from schemas.config import load_toml
    from trainer.config.train import TrainConfig
    from trainer.run.launch import run_train_job

    write_corpus(RUN / "corpus", {"teacher": 0})
    make_tokenizer(RUN / "corpus" / "teacher", MODEL)
    run_label_job(load_toml(str(CONFIGS / "label.toml"), LabelConfig))
    run_train_job(load_toml(str(CONFIGS / "train.toml"), TrainConfig))
    keep_model(RUN / "model" / "student", MODEL)


if __name__ == "__main__":
    main()
