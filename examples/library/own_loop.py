"""Distillation in your own training loop: `python examples/library/own_loop.py`.

Needs the labels of `make demo`. Under torchrun, every rank opens the dataset with its `rank` and
`world_size`, and multiplies the loss by `world_size`.
"""

import argparse

import torch
from student import TOKENIZER, make_student
from torch.utils.data import DataLoader

from trainer import (
    DataConfig,
    DistillationHead,
    LossConfig,
    StudentWithHead,
    ViewDataset,
    check_student,
)


def train(
    student: StudentWithHead,
    dataset: ViewDataset,
    loss: LossConfig,
    lr: float,
    num_workers: int = 0,
) -> list[float]:
    """Trains on the dataset; returns the mean loss per label of every step, in nats."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr)
    losses = [0.0]
    for batch in DataLoader(dataset, batch_size=None, num_workers=num_workers):
        # One scalar, the sum over the labels; parts are its detached summands. A tensor of shape
        # [tokens, vocabulary] never exists.
        loss_sum, parts = student(batch["input_ids"], batch["position_ids"], batch["targets"], loss)
        (loss_sum / batch["step_weight"]).backward()
        losses[-1] += float(parts["loss"]) / batch["step_weight"]
        if batch["state"]["micro_batch"] == 0:  # the last micro-batch of its step
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {len(losses)}: loss {losses[-1]:.4f}", flush=True)
            losses.append(0.0)
    return losses[:-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--view", default="runs/demo/views/train")
    parser.add_argument("--tokenizer", default=str(TOKENIZER))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", default="runs/library/own_loop")
    args = parser.parse_args()
    model, tokenizer = make_student(args.tokenizer)
    check_student(model)  # proves that packing is exact and that the head gives the logits
    # The student's lm_head becomes a DistillationHead of the same parameters. Other models can call
    # `DistillationHead.around(lm_head)(hidden, targets, loss)` directly.
    student = StudentWithHead(model)
    assert isinstance(model.lm_head, DistillationHead)
    loss = LossConfig(kind="forward_kl")
    data = DataConfig(max_tokens=512, sequences_per_step=4, micro_batch_size=2, steps=args.steps)
    dataset = ViewDataset(args.view, data, loss, model.config.vocab_size, tokenizer)
    train(student, dataset, loss, lr=2e-3)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"an ordinary Hugging Face folder: {args.out}")


if __name__ == "__main__":
    main()
