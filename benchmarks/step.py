"""The whole training step, distilled against hard-label: `python -m benchmarks.step`.

One student, one DeepSpeed engine as the trainer builds it (a process group of one, without Ray),
and the demo teacher's labels of real text. A step is the trainer's own
(`trainer.engine.train_step`): wait for the batch, forward and backward of every micro-batch,
gradient norm, optimizer. The same global steps are taken once on hard labels and once distilled, in
turns in one process, by two loaders that read the same rows in the same order; which comes first
alternates.

**Time**: the median over turns of the ratio of the two, for each kind of labels; beside it the same
of CPU seconds of the whole process, loaders included, and the ratio of the least times, both of
which a busy machine disturbs less.

**Waiting**: the share of its time that a run of distilled steps alone, one after another, waits for
the loader. The first step, which nothing was prepared before, is left out.

**Peak memory**: what one step takes above what is held before it, with freed memory given back to
the system first: by the peak of the resident set (/proc/self/clear_refs, VmHWM), on CUDA by
max_memory_allocated. Activations and gradients count, weights and optimizer state do not.

JSON: `kd_over_ce_step_time`, `kd_over_ce_step_peak_memory` and `data_wait_share`, each of the worse
of the two kinds of labels.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks.demo_labels import TEACHER, real_rows
from benchmarks.label_views import TOPK, make_view, threshold_record
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
MIB = 1 << 20
KEYS = ("kd_over_ce_step_time", "kd_over_ce_step_peak_memory", "data_wait_share")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--json", metavar="PATH", help="also write the figures there")
    parser.add_argument("--labels", type=int, default=200_000, help="labels of the view, about")
    parser.add_argument("--turns", type=int, default=20, help="pairs of steps that are timed")
    parser.add_argument("--steps", type=int, default=15, help="steps that the waiting is taken of")
    parser.add_argument("--hidden-size", type=int, default=256, help="of the student")
    parser.add_argument("--layers", type=int, default=4, help="of the student")
    parser.add_argument("--tokens", type=int, default=512, help="of a sequence, 512 up; 2 a step")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    args = parser.parse_args()
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:5.0f} s] {text}", flush=True)

    rows = real_rows(min(LABELS_ONCE, args.labels))
    copies = max(1, args.labels // rows.num_labels)
    say(f"{rows.num_labels} labels of real text, {copies} times")
    details: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch, _alone(Path(scratch)):
        for name, record in (("threshold_12", threshold_record(rows)), ("topk_64", TOPK)):
            view = make_view(Path(scratch) / name, rows, record, copies)
            say(f"{name}: labelled; {args.turns} turns, then {args.steps} steps of waiting")
            details[name] = one = _measure(view, args)
            say(f"{name}: {_line(one)}")
    figures = {key: max(one[key] for one in details.values()) for key in KEYS}
    for key, value in figures.items():
        print(f"{key} {value:.4f}")
    if args.json:
        text = json.dumps({**figures, "arguments": vars(args), "details": details}, indent=2)
        Path(args.json).write_text(text + "\n", encoding="utf-8")


def _line(one: dict[str, float]) -> str:
    return (
        f"distilled over hard {one['kd_over_ce_step_time']:.3f} (CPU seconds "
        f"{one['kd_over_ce_cpu_time']:.3f}, least times {one['kd_over_ce_least_time']:.3f}), "
        f"{1e3 * one['kd_step_s']:.0f} ms a step; peak {one['kd_peak_bytes'] / MIB:.0f} MiB, "
        f"over hard {one['kd_over_ce_step_peak_memory']:.3f}; waits "
        f"{100 * one['data_wait_share']:.2f}%"
    )


@contextmanager
def _alone(scratch: Path) -> Iterator[None]:
    """A process group of this process."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for what a launcher would set
    store = dist.FileStore(str(scratch / "store"), 1)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
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
    with _loading(view, kd, vocab_size) as of_kd, _loading(view, hard, vocab_size) as of_hard:
        pair = ((distilled, of_kd), (TrainStep(engine, hard, Guard(hard.guard, {})), of_hard))
        kd_taken, hard_taken = _turns(pair, args.turns)
        peaks = [_peak(step, next(loader)) for step, loader in pair]
    waited = total = 0.0
    with _loading(view, kd, vocab_size) as loader:
        for number in range(args.steps + SKIPPED):
            taken = _timed(distilled, loader)
            if number >= SKIPPED:
                waited += loader.wait_s
                total += taken.wall_s
    pairs = list(zip(kd_taken, hard_taken, strict=True))
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


class _Taken(NamedTuple):
    """Seconds of one step: of the clock, and of all threads of this process."""

    wall_s: float
    cpu_s: float


def _turns(
    pair: tuple[tuple[TrainStep, Loader], tuple[TrainStep, Loader]], num_turns: int
) -> tuple[list[_Taken], list[_Taken]]:
    """What every turn's step of either took; a first turn is not counted."""
    steps: tuple[list[_Taken], list[_Taken]] = [], []
    for turn in range(num_turns + SKIPPED):
        for which in (0, 1) if turn % 2 else (1, 0):
            taken = _timed(*pair[which])
            if turn >= SKIPPED:
                steps[which].append(taken)
    return steps


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
        "ray": {"cpus_per_worker": args.threads, "use_gpu": torch.cuda.is_available()},
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


def _timed(step: TrainStep, loader: Loader) -> _Taken:
    """One optimizer step, waiting for its batch included."""
    wall, cpu = time.perf_counter(), time.process_time()
    _run(step, next(loader))
    return _Taken(time.perf_counter() - wall, time.process_time() - cpu)


def _run(step: TrainStep, batch: StepBatch) -> None:
    step.run(batch, step=1, lr=LR)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak(step: TrainStep, batch: StepBatch) -> int:
    """Bytes that a step takes at most, above what is held before it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _run(step, batch)
        return int(torch.cuda.max_memory_allocated()) - held
    _give_memory_back()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is now what is held
    held = _peak_resident()
    _run(step, batch)
    return _peak_resident() - held


def _give_memory_back() -> None:
    """Returns what is free to the system, from now on as soon as it is."""
    libc = ctypes.CDLL("libc.so.6")
    m_mmap_threshold = -3
    libc.mallopt(m_mmap_threshold, MIB)
    gc.collect()
    libc.malloc_trim(0)


def _peak_resident() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    main()
