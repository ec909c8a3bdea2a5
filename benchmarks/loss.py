"""Time and memory of distillation losses against cross-entropy: ``python -m benchmarks.loss``.

Forward and backward of the output head and its loss, from hidden states [T, H] and a weight [V, H]:

- fused cross-entropy, the project's own head on hard labels, which defines 1.00;
- forward_kl on threshold labels of 12 ids, and ghost on top-64 labels, at temperatures 1 and 2;
- dense: all logits at once, log_softmax, and for distillation a dense teacher, with autograd.

**Time**: the cases take turns in one process, and each is compared with the cross-entropy of the
same turn. Results are medians of these ratios, in wall time and in CPU seconds, which a busy
machine disturbs less. The order changes from turn to turn; an uncounted call on a tiny shape loads
the libraries.

**Peak memory**: a fresh process for each case, since allocators keep memory. After an uncounted
call on a tiny shape, the peak of one forward and backward above the memory held before it. So
gradients count; inputs, labels and the dense teacher do not.

Results: ``kd_over_ce_time``, ``kd_over_ce_cpu_time`` and ``kd_over_ce_peak_memory`` are those of
the worse of the two losses at temperature 1, on the last shape, by default 4096 x 32768, H = 1024;
``fused_over_dense_peak_memory`` is that of the worse of the two over the dense KL.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.harness import (
    MIB,
    Seconds,
    command_line,
    peak_bytes,
    timed,
    write_results,
)
from benchmarks.loss_cases import CASES, CROSS_ENTROPY, DENSE, Inputs, Shape
from schemas.console.text import table

SHAPES = ("1024x4096x256", "1024x32768x1024", "4096x32768x1024")
LEAST_TURNS = 2
AT_TEMPERATURE_ONE = ("threshold_t1", "topk_t1")


def main() -> None:
    parser = command_line("loss", __doc__)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="TxVxH; ratios are of the last")
    parser.add_argument(
        "--cases", nargs="+", default=CASES, choices=CASES, help=f"must include {CROSS_ENTROPY}"
    )
    parser.add_argument("--turns", type=int, default=7, help="maximum number of timed turns")
    parser.add_argument(
        "--seconds",
        type=float,
        default=100.0,
        help=f"time limit per shape; at least {LEAST_TURNS} turns",
    )
    parser.add_argument(
        "--chunk-tokens", type=int, default=0, help="of the fused head; 0: as the trainer chooses"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: torch's default")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.peak_of:
        print(_peak_here(args, _shape(args.shapes[0])))
        return
    write_results(args, measure(args))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measures everything and prints results as they arrive."""
    details = []
    for text in args.shapes:
        shape = _shape(text)
        chunks = f"chunks of {args.chunk_tokens}" if args.chunk_tokens else "default chunks"
        print(f"{shape}, {args.device}, {args.dtype}, {chunks}", flush=True)
        seconds = _time_in_turns(args, shape)
        peaks = {name: _peak(args, text, name) for name in args.cases}
        rows = {name: _row(name, seconds, peaks) for name in args.cases}
        _show(rows)
        details.append({"shape": text, "cases": rows})
    ratios = _ratios(details[-1]["cases"])
    for name, ratio in ratios.items():
        print(f"{name} {ratio:.3f}")
    return {**ratios, "torch_threads": torch.get_num_threads(), "shapes": details}


def _ratios(cases: dict[str, dict[str, float]]) -> dict[str, float]:
    """Ratios of the worse of the two losses at temperature 1."""
    ours = [cases[name] for name in AT_TEMPERATURE_ONE if name in cases]
    ratios = {
        f"kd_{name}": max(case[name] for case in ours)
        for name in ("over_ce_time", "over_ce_cpu_time", "over_ce_peak_memory")
    }
    if DENSE in cases:
        largest = max(case["peak_bytes"] for case in ours)
        ratios["fused_over_dense_peak_memory"] = largest / cases[DENSE]["peak_bytes"]
    return ratios


def _shape(text: str) -> Shape:
    return Shape(*(int(number) for number in text.split("x")))


def _time_in_turns(args: argparse.Namespace, shape: Shape) -> dict[str, list[Seconds]]:
    """Seconds of one forward and backward per turn, by case."""
    _warm_up(args, shape, args.cases)
    inputs = _inputs(args, shape)
    cases = {name: inputs.case(name) for name in args.cases}
    seconds: dict[str, list[Seconds]] = {name: [] for name in cases}
    started = time.perf_counter()
    for turn in range(args.turns):
        if turn >= LEAST_TURNS and time.perf_counter() - started > args.seconds:
            break
        shift = turn % len(cases)
        for name in [*cases][shift:] + [*cases][:shift]:
            inputs.hidden.grad = inputs.weight.grad = None
            seconds[name].append(timed(partial(_forward_backward, cases[name]), args.device))
    return seconds


def _warm_up(args: argparse.Namespace, shape: Shape, names: Sequence[str]) -> None:
    """Loads libraries, with an uncounted call on a tiny shape."""
    tiny = Shape(8, shape.vocab_size, shape.hidden_size)
    for name in names:
        _inputs(args, tiny).case(name)().backward()


def _inputs(args: argparse.Namespace, shape: Shape) -> Inputs:
    return Inputs(shape, args.device, getattr(torch, args.dtype), args.chunk_tokens or None)


def _peak(args: argparse.Namespace, shape: str, name: str) -> int:
    """Peak bytes of a case's forward and backward, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.loss", "--peak-of", name, "--shapes", shape]
    for option in ("chunk_tokens", "device", "dtype", "threads"):
        command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout)


def _peak_here(args: argparse.Namespace, shape: Shape) -> int:
    _warm_up(args, shape, [args.peak_of])
    case = _inputs(args, shape).case(args.peak_of)
    return peak_bytes(partial(_forward_backward, case), args.device)


def _forward_backward(case: Callable[[], torch.Tensor]) -> None:
    case().backward()


def _row(name: str, seconds: dict[str, list[Seconds]], peaks: dict[str, int]) -> dict[str, float]:
    pairs = list(zip(seconds[name], seconds[CROSS_ENTROPY], strict=True))
    return {
        "turns": len(pairs),
        "seconds": statistics.median(ours.wall_s for ours, _ in pairs),
        "over_ce_time": statistics.median(ours.wall_s / ce.wall_s for ours, ce in pairs),
        "over_ce_cpu_time": statistics.median(ours.cpu_s / ce.cpu_s for ours, ce in pairs),
        "peak_bytes": peaks[name],
        "over_ce_peak_memory": peaks[name] / peaks[CROSS_ENTROPY],
    }


def _show(rows: dict[str, dict[str, float]]) -> None:
    head = ("", "ms", "over CE", "in CPU s", "peak MiB", "over CE")
    lines = [
        (
            name,
            f"{1e3 * row['seconds']:.1f}",
            f"{row['over_ce_time']:.3f}",
            f"{row['over_ce_cpu_time']:.3f}",
            f"{row['peak_bytes'] / MIB:.1f}",
            f"{row['over_ce_peak_memory']:.3f}",
        )
        for name, row in rows.items()
    ]
    print(table(head, lines, right=range(1, len(head))) + "\n", flush=True)


if __name__ == "__main__":
    main()
