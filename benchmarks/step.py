"""The whole training step, distilled against hard-label: `python -m benchmarks.step`.

One student, one DeepSpeed engine as the trainer builds it (world size 1, without Ray), and the demo
teacher's labels of real text. A turn takes the same global step twice, once on hard labels and once
distilled, each with the batch of its own loader; which comes first alternates. A step is the
forward and backward passes, the gradient norm and the optimizer's step. The median over turns of
the ratio of the two is `kd_over_ce_step_time`, of the slower of the two kinds of labels.

`data_wait_share` is the share of its time that a run of distilled steps alone, one after another,
waits for the loader; of the kind that waits longer. The first step, which no step comes before, is
left out.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.demo_labels import TEACHER, real_rows
from benchmarks.label_views import TOPK, make_view, threshold_record
from schemas.config import validated
from schemas.view import View
from trainer.config import TrainConfig
from trainer.engine import build_engine, gradient_norm, prepare_process
from trainer.loader import Loader, StepBatch
from trainer.plan import LoaderState, read_row_table
from trainer.student import StudentWithHead, build_student

LABELS_ONCE = 20_000
SKIPPED = 1


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--json", metavar="PATH", help="also write the figures there")
    parser.add_argument("--labels", type=int, default=200_000, help="labels of the view, about")
    parser.add_argument("--turns", type=int, default=15, help="pairs of steps that are timed")
    parser.add_argument("--steps", type=int, default=15, help="steps that the waiting is taken of")
    parser.add_argument("--hidden-size", type=int, default=256, help="of the student")
    parser.add_argument("--layers", type=int, default=4, help="of the student")
    parser.add_argument("--tokens", type=int, default=1024, help="of a sequence, 512 up; 4 a step")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    args = parser.parse_args()
    rows = real_rows(min(LABELS_ONCE, args.labels))
    copies = max(1, args.labels // rows.num_labels)
    details: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch, _alone(Path(scratch)):
        for name, record in (("topk_64", TOPK), ("threshold_12", threshold_record(rows))):
            view = make_view(Path(scratch) / name, rows, record, copies)
            details[name] = _measure(view, args)
            print(
                f"{name}: distilled over hard {details[name]['kd_over_ce_step_time']:.3f}, "
                f"{details[name]['kd_step_s'] * 1e3:.0f} ms a step, waits for data "
                f"{100 * details[name]['data_wait_share']:.2f}%",
                flush=True,
            )
    figures = {
        key: max(one[key] for one in details.values())
        for key in ("kd_over_ce_step_time", "data_wait_share")
    }
    if args.json:
        text = json.dumps({**figures, "arguments": vars(args), "details": details}, indent=2)
        Path(args.json).write_text(text + "\n", encoding="utf-8")


@contextmanager
def _alone(scratch: Path) -> Iterator[None]:
    """A process group of this process."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for what a launcher would set
    store = dist.FileStore(str(scratch / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _measure(view: View, args: argparse.Namespace) -> dict[str, float]:
    kd = _config(view, args, "forward_kl" if view.records[0].has_draws else "ghost")
    hard = _config(view, args, "hard")
    prepare_process(kd)
    model, _ = build_student(kd.student)
    engine = build_engine(StudentWithHead(model), kd)
    vocab_size = model.get_output_embeddings().weight.shape[0]
    ratios, kd_s, ce_s = [], [], []
    with _loading(view, kd, vocab_size) as of_kd, _loading(view, hard, vocab_size) as of_hard:
        for turn in range(args.turns + SKIPPED):
            jobs = [(kd, next(of_kd)), (hard, next(of_hard))]
            seconds = {
                job.loss.kind: _step(engine, job, batch)
                for job, batch in (jobs if turn % 2 else reversed(jobs))
            }
            if turn >= SKIPPED:
                kd_s.append(seconds[kd.loss.kind])
                ce_s.append(seconds["hard"])
                ratios.append(kd_s[-1] / ce_s[-1])
    waited = total = 0.0
    with _loading(view, kd, vocab_size) as loader:
        for number in range(args.steps + SKIPPED):
            before = time.perf_counter()
            _step(engine, kd, next(loader))
            if number >= SKIPPED:
                waited += loader.wait_s
                total += time.perf_counter() - before
    return {
        "kd_over_ce_step_time": statistics.median(ratios),
        "kd_step_s": statistics.median(kd_s),
        "ce_step_s": statistics.median(ce_s),
        "data_wait_share": waited / total,
    }


def _config(view: View, args: argparse.Namespace, kind: str) -> TrainConfig:
    size = args.hidden_size
    content: dict[str, Any] = {
        "run": "unused",
        "view": view.url,
        "student": {
            "config": {
                "model_type": "llama",
                "hidden_size": size,
                "intermediate_size": 4 * size,
                "num_hidden_layers": args.layers,
                "num_attention_heads": max(1, size // 64),
                "num_key_value_heads": max(1, size // 64),
                "tie_word_embeddings": True,
            },
            "tokenizer": str(TEACHER),
        },
        "loss": {"kind": kind},
        "data": {"max_tokens": args.tokens, "sequences_per_step": 4, "epochs": 1000},
        "ray": {"cpus_per_worker": args.threads},
    }
    return validated(content, TrainConfig, "benchmark")


@contextmanager
def _loading(view: View, config: TrainConfig, vocab_size: int) -> Iterator[Loader]:
    start = LoaderState(view_hash=view.view_hash, seed=0, epoch=0, step=0)
    rows = read_row_table(view, config.data)
    loader = Loader(config, view, rows, start, 0, vocab_size)
    try:
        yield loader
    finally:
        loader.close()


def _step(engine: Any, config: TrainConfig, batch: StepBatch) -> float:
    """Seconds of one optimizer step, done as `trainer.loop` does it."""
    before = time.perf_counter()
    scale = 1.0 / sum(micro_batch.weight for micro_batch in batch.micro_batches)
    for number, micro_batch in enumerate(batch.micro_batches, start=1):
        loss_sum, _ = engine(
            micro_batch.input_ids, micro_batch.position_ids, micro_batch.targets, config.loss
        )
        engine.backward(loss_sum * scale, scale_wrt_gas=False)
        if number == len(batch.micro_batches):
            gradient_norm(engine)
        engine.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - before


if __name__ == "__main__":
    main()
