"""Parquet shards to packed batches on one core: ``python -m benchmarks.loader``.

Writes the demo teacher's labels of real text to a label set and reads an epoch with the trainer's
loader, as training does: planned, decoded by row group with checksums verified, gathered, packed
and converted to tensors. Nothing is decoded before the clock starts.

All threads of the loader run on one core. Tokens/s are per CPU second of all threads, so a busy
machine does not matter; padding does not count. The system's file cache is warm.

Results: ``tokens_per_s_per_core`` by kind of record.
"""

import os
import statistics
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from benchmarks.demo_labels import real_rows
from benchmarks.harness import Seconds, command_line, timed, write_results
from benchmarks.label_views import make_view
from benchmarks.records import TOPK_64, threshold_record
from schemas.config import validated
from schemas.views.view import View
from trainer.config.train import TrainConfig
from trainer.data.loader import Loader
from trainer.data.row_order import LoaderState, count_steps, read_row_table

TEACHER_VOCABULARY = 4096
LABELS_ONCE = 20_000


def main() -> None:
    parser = command_line("loader", __doc__)
    parser.add_argument("--labels", type=int, default=600_000, help="approximate number of labels")
    parser.add_argument("--repeats", type=int, default=5, help="epochs read, from an empty cache")
    args = parser.parse_args()
    rows = real_rows(min(LABELS_ONCE, args.labels))
    copies = max(1, args.labels // rows.num_labels)
    figures: dict[str, Any] = {"tokens_per_s_per_core": {}, "details": {}}
    for name, record in (("topk_64", TOPK_64), ("threshold_12", threshold_record(rows))):
        with tempfile.TemporaryDirectory() as folder:
            view = make_view(Path(folder), rows, record, copies)
            measured = _measure(view, args.repeats)
        figures["tokens_per_s_per_core"][name] = measured["tokens_per_cpu_s"]
        figures["details"][name] = measured
        print(
            f"{name}: {measured['tokens_per_cpu_s'] / 1e6:.2f} M tokens/s of CPU time, "
            f"{measured['tokens_per_s'] / 1e6:.2f} M of wall time; {measured['num_tokens']} tokens "
            f"in {measured['num_rows']} rows, {measured['num_row_groups']} row groups"
        )
    write_results(args, figures)


def config(view: View) -> TrainConfig:
    """One epoch of sequences of 2048 tokens, eight per step."""
    content: dict[str, Any] = {
        "run": "unused",
        "view": view.url,
        "student": {"config": {"model_type": "llama"}, "tokenizer": "unused"},
        "loss": {"kind": "forward_kl" if view.records[0].has_draws else "ghost"},
        "data": {"max_tokens": 2048, "sequences_per_step": 8, "epochs": 1},
    }
    return validated(content, TrainConfig, "benchmark")


def _measure(view: View, repeats: int) -> dict[str, Any]:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    torch.set_num_threads(1)
    try:
        runs = [_epoch(view) for _ in range(repeats + 1)][1:]
    finally:
        os.sched_setaffinity(0, cores)
    rows = read_row_table(view, config(view).data)
    num_tokens = int(rows.num_tokens.sum())
    return {
        "tokens_per_cpu_s": num_tokens / statistics.median(run.cpu_s for run in runs),
        "tokens_per_s": num_tokens / statistics.median(run.wall_s for run in runs),
        "num_tokens": num_tokens,
        "num_rows": len(rows),
        "num_row_groups": len(rows.groups),
        "record": view.records[0].identity(),
    }


def _epoch(view: View) -> Seconds:
    """Seconds of one epoch, from a planned view to the last batch."""
    job = config(view)
    rows = read_row_table(view, job.data)
    num_steps = count_steps(rows, job.data)
    start = LoaderState(view_hash=view.view_hash, seed=0, epoch=0, step=0)

    def read() -> None:
        with closing(Loader(job, view, rows, start, 0, TEACHER_VOCABULARY)) as loader:
            for _ in range(num_steps):
                next(loader)

    return timed(read)


if __name__ == "__main__":
    main()
