"""A training step, distilled against hard-label: ``python -m benchmarks.step``.

Uses one student, one DeepSpeed engine as the trainer builds it (a process group of one, without
Ray), and the demo teacher's labels of real text. A step is the trainer's
`trainer.engine.train_step`: wait for the batch, forward and backward of every micro-batch, gradient
norm, optimizer. Distilled and hard-label steps alternate in one process, fed by two
loaders that read the same rows in the same order; which comes first alternates too.

**Time**: the median over turns of the ratio of the two, for each kind of labels. Also the same for
CPU seconds of the process, loaders included, and the ratio of the minimum times, which a busy
machine disturbs less.

**Waiting**: the share of time that consecutive distilled steps wait for the loader. The first step,
for which nothing was prefetched, is left out.

**Peak memory**: the peak of one step above the memory held before it. Activations and gradients
count, weights and optimizer state do not.

Results: ``kd_over_ce_step_time``, ``kd_over_ce_step_peak_memory`` and ``data_wait_share``, each of
the worse of the two kinds of labels.
"""

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.demo_labels import TEACHER, real_rows
from benchmarks.harness import (
    MIB,
    Seconds,
    command_line,
    peak_bytes,
    timed,
    write_results,
)
from benchmarks.label_views import make_view
from benchmarks.records import TOPK_64, threshold_record
from schemas.config import validated
from schemas.views.view import View
from trainer.config.train import TrainConfig
from trainer.data.loader import Loader, StepBatch
from trainer.data.row_order import LoaderState, read_row_table
from trainer.engine.deepspeed_engine import build_engine, prepare_process
from trainer.engine.guards import Guard
from trainer.engine.train_step import TrainStep
from trainer.student.build import StudentWithHead, build_student

LABELS_ONCE = 20_000
SKIPPED = 1
LR = 1e-4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEYS = ("kd_over_ce_step_time", "kd_over_ce_step_peak_memory", "data_wait_share")


def main() -> None:
    parser = command_line("step", __doc__)
    parser.add_argument("--labels", type=int, default=200_000, help="approximate labels of a view")
    parser.add_argument("--turns", type=int, default=20, help="timed pairs of steps")
    parser.add_argument("--steps", type=int, default=15, help="steps to measure waiting on")
    parser.add_argument("--hidden-size", type=int, default=256, help="student's hidden size")
    parser.add_argument("--layers", type=int, default=4, help="student's layers")
    parser.add_argument("--tokens", type=int, default=512, help="sequence length, at least 512")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a CPU")
    args = parser.parse_args()
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:5.0f} s] {text}", flush=True)

    rows = real_rows(min(LABELS_ONCE, args.labels))
    copies = max(1, args.labels // rows.num_labels)
    say(f"{rows.num_labels} labels of real text, {copies} times")
    details: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch, _process_group(Path(scratch)):
        for name, record in (("threshold_12", threshold_record(rows)), ("topk_64", TOPK_64)):
            view = make_view(Path(scratch) / name, rows, record, copies)
            say(f"{name}: labelled; {args.turns} turns, then {args.steps} steps of waiting")
            details[name] = one = _measure(view, args)
            say(f"{name}: {_line(one)}")
    figures = {key: max(one[key] for one in details.values()) for key in KEYS}
    for key, value in figures.items():
        print(f"{key} {value:.4f}")
    write_results(args, {**figures, "details": details})


def _line(one: dict[str, float]) -> str:
    return (
        f"distilled over hard {one['kd_over_ce_step_time']:.3f} (CPU seconds "
        f"{one['kd_over_ce_cpu_time']:.3f}, least times {one['kd_over_ce_least_time']:.3f}), "
        f"{1e3 * one['kd_step_s']:.0f} ms a step; peak {one['kd_peak_bytes'] / MIB:.0f} MiB, "
        f"over hard {one['kd_over_ce_step_peak_memory']:.3f}; waits "
        f"{100 * one['data_wait_share']:.2f}%"
    )


@contextmanager
def _process_group(scratch: Path) -> Iterator[None]:
    """Sets up a process group of this process alone."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed requires it; launchers set it
    store = dist.FileStore(str(scratch / "store"), 1)
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
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
    distilled = TrainStep(engine, kd, Guard(kd.guard, {}))
    with _loading(view, kd, vocab_size) as kd_loader, _loading(view, hard, vocab_size) as loader:
        hard_step = TrainStep(engine, hard, Guard(hard.guard, {}))
        pair = ((distilled, kd_loader), (hard_step, loader))
        pairs = list(zip(*_turns(pair, args.turns), strict=True))
        peaks = [
            peak_bytes(functools.partial(_run, step, next(loader)), DEVICE) for step, loader in pair
        ]
    waited = total = 0.0
    with _loading(view, kd, vocab_size) as loader:
        for number in range(args.steps + SKIPPED):
            seconds = _time_step(distilled, loader)
            if number >= SKIPPED:
                waited += loader.wait_s
                total += seconds.wall_s
    kd_s, hard_s = [ours.wall_s for ours, _ in pairs], [theirs.wall_s for _, theirs in pairs]
    return {
        "kd_over_ce_step_time": statistics.median(a.wall_s / b.wall_s for a, b in pairs),
        "kd_over_ce_cpu_time": statistics.median(a.cpu_s / b.cpu_s for a, b in pairs),
        "kd_over_ce_least_time": min(kd_s) / min(hard_s),
        "kd_step_s": statistics.median(kd_s),
        "ce_step_s": statistics.median(hard_s),
        "kd_peak_bytes": peaks[0],
        "ce_peak_bytes": peaks[1],
        "kd_over_ce_step_peak_memory": peaks[0] / peaks[1],
        "data_wait_share": waited / total,
    }


def _turns(
    pair: tuple[tuple[TrainStep, Loader], tuple[TrainStep, Loader]], num_turns: int
) -> tuple[list[Seconds], list[Seconds]]:
    """Seconds of both steps in every turn, after an uncounted first one."""
    seconds: tuple[list[Seconds], list[Seconds]] = [], []
    for turn in range(num_turns + SKIPPED):
        for which in (0, 1) if turn % 2 else (1, 0):
            seconds[which].append(_time_step(*pair[which]))
    return seconds[0][SKIPPED:], seconds[1][SKIPPED:]


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
        "data": {"max_tokens": args.tokens, "sequences_per_step": 2, "steps": 1_000_000},
        "ray": {"cpus_per_worker": args.threads, "use_gpu": DEVICE == "cuda"},
    }
    return validated(content, TrainConfig, "benchmark")


def _loading(view: View, config: TrainConfig, vocab_size: int) -> "closing[Loader]":
    start = LoaderState(view_hash=view.view_hash, seed=0, epoch=0, step=0)
    rows = read_row_table(view, config.data)
    return closing(Loader(config, view, rows, start, 0, vocab_size))


def _time_step(step: TrainStep, loader: Loader) -> Seconds:
    """Seconds of one optimizer step, including the wait for its batch."""
    return timed(lambda: _run(step, next(loader)), DEVICE)


def _run(step: TrainStep, batch: StepBatch) -> None:
    step.run(batch, step=1, lr=LR)


if __name__ == "__main__":
    main()
