"""Distillation in a Hugging Face Trainer: `python examples/library/hf_trainer.py`.

Needs the labels of `make demo`, and `pip install accelerate`, which the Trainer requires.
"""

import argparse
from typing import Any

from student import TOKENIZER, make_student
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from trainer import DataConfig, LossConfig, StudentWithHead, ViewDataset


class DistillationTrainer(Trainer):
    """A Trainer whose model is a `StudentWithHead` and whose train_dataset is a `ViewDataset`.

    The dataset packs, orders and shards by rank, so its batches are used unchanged, and
    ``gradient_accumulation_steps`` must be its ``micro_batches_per_step``.
    """

    def __init__(self, *args: Any, loss: LossConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss = loss

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.train_dataset,
            batch_size=None,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.device.type == "cuda",
        )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        targets = inputs["targets"].to(self.args.device)
        loss_sum, parts = model(inputs["input_ids"], inputs["position_ids"], targets, self.loss)
        # step_weight counts the labels of all ranks and micro-batches of the step already, but the
        # Trainer divides by the micro-batches, and data-parallel wrappers by the ranks.
        divided_later = self.args.world_size * self.current_gradient_accumulation_steps
        mean: Tensor = loss_sum * divided_later / inputs["step_weight"]
        return (mean, parts) if return_outputs else mean

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Saves the model itself as an ordinary Hugging Face folder."""
        folder = output_dir or self.args.output_dir
        self.accelerator.unwrap_model(self.model).model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--view", default="runs/demo/views/train")
    parser.add_argument("--tokenizer", default=str(TOKENIZER))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", default="runs/library/hf_trainer")
    args = parser.parse_args()
    model, tokenizer = make_student(args.tokenizer)
    loss = LossConfig(kind="forward_kl")
    data = DataConfig(max_tokens=512, sequences_per_step=4, micro_batch_size=2, steps=args.steps)
    dataset = ViewDataset(args.view, data, loss, model.config.vocab_size, tokenizer)
    trainer = DistillationTrainer(
        model=StudentWithHead(model),
        train_dataset=dataset,
        loss=loss,
        args=TrainingArguments(
            output_dir=args.out,
            max_steps=dataset.num_steps(),
            gradient_accumulation_steps=dataset.micro_batches_per_step,
            learning_rate=2e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
        ),
    )
    trainer.train()
    trainer.save_model()
    tokenizer.save_pretrained(args.out)
    print(f"an ordinary Hugging Face folder: {args.out}")


if __name__ == "__main__":
    main()
