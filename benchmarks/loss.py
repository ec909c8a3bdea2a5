"""Time and memory of distillation losses against cross-entropy: `python -m benchmarks.loss`.

Forward and backward of the output head and its loss, from hidden states [T, H] and a weight [V, H]:

- fused cross-entropy, the project's own head on hard labels: what 1.00 is;
- forward_kl on threshold labels of 12 ids, and ghost on top-64 labels, at temperatures 1 and 2;
- the dense way: all logits at once, log_softmax, and for distillation a dense teacher, by autograd.

**Time**: the cases take turns in one process, and each turn is compared with the cross-entropy of
the same turn; medians of these ratios, of the clock and of CPU seconds, which a busy machine
disturbs less. Order changes from turn to turn. A call of a tiny shape comes first, uncounted.

**Peak memory**: a fresh process a case. Inputs, labels and the dense teacher are made, a first call
of a tiny shape loads the libraries, then the peak of the resident set is reset (/proc/self/
clear_refs) and one forward and backward is run; what the new peak (VmHWM, as getrusage's ru_maxrss
knows the parent's peak as well) is above the resident set before. So gradients count, inputs do
not, and neither does the dense teacher. On CUDA it is max_memory_allocated in the same place.

JSON: `kd_over_ce_time`, `kd_over_ce_cpu_time` (in CPU seconds) and `kd_over_ce_peak_memory` are
those of the worse of the two losses at temperature 1, on the largest shape;
`fused_over_dense_peak_memory` of the worse of the two over the dense KL there. By default that is
4096 x 32768, H = 1024.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.loss_cases import CASES, CROSS_ENTROPY, DENSE, Inputs, Shape

SHAPES = ("1024x4096x256", "1024x32768x1024", "4096x32768x1024")
LEAST_TURNS = 2
MIB = 1 << 20
AT_ONE = ("threshold_t1", "topk_t1")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss", description=__doc__)
    parser.add_argument("--json", metavar="PATH", help="also write the figures there")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="TxVxH, the last one counts")
    parser.add_argument(
        "--cases", nargs="+", default=CASES, choices=CASES, help="fused_ce among them"
    )
    parser.add_argument("--turns", type=int, default=7, help="timed turns of all cases, at most")
    parser.add_argument(
        "--seconds",
        type=float,
        default=100.0,
        help="no new turn after these, of a shape; 2 at least",
    )
    parser.add_argument(
        "--chunk-tokens", type=int, default=0, help="of the fused head; 0: as the trainer chooses"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: as it likes")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.peak_of:
        print(_peak_here(args, _shape(args.shapes[0])))
        return
    figures = measure(args)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures, printed as they come."""
    details = []
    for text in args.shapes:
        shape = _shape(text)
        chunks = f"chunks of {args.chunk_tokens}" if args.chunk_tokens else "chunks as chosen"
        print(f"{shape}, {args.device}, {args.dtype}, {chunks}", flush=True)
        taken = _times(args, shape)
        peaks = {name: _peak(args, text, name) for name in args.cases}
        rows = {name: _row(name, taken, peaks) for name in args.cases}
        _show(rows)
        details.append({"shape": text, "cases": rows})
    ratios = _ratios(details[-1]["cases"])
    figures = {
        **ratios,
        "device": args.device,
        "dtype": args.dtype,
        "chunk_tokens": args.chunk_tokens,
        "threads": torch.get_num_threads(),
        "turns": args.turns,
        "shapes": details,
    }
    for name, ratio in ratios.items():
        print(f"{name} {ratio:.3f}")
    return figures


def _ratios(cases: dict[str, dict[str, float]]) -> dict[str, float]:
    """Of the worse of the two losses at temperature 1."""
    ours = [cases[name] for name in AT_ONE if name in cases]
    ratios = {
        "kd_over_ce_time": max(case["over_ce_time"] for case in ours),
        "kd_over_ce_cpu_time": max(case["over_ce_cpu_time"] for case in ours),
        "kd_over_ce_peak_memory": max(case["over_ce_peak_memory"] for case in ours),
    }
    if DENSE in cases:
        largest = max(case["peak_bytes"] for case in ours)
        ratios["fused_over_dense_peak_memory"] = largest / cases[DENSE]["peak_bytes"]
    return ratios


def _shape(text: str) -> Shape:
    return Shape(*(int(number) for number in text.split("x")))


class _Taken(NamedTuple):
    """Seconds of one forward and backward: of the clock, and of all threads of this process."""

    wall_s: float
    cpu_s: float


def _times(args: argparse.Namespace, shape: Shape) -> dict[str, list[_Taken]]:
    """What every turn took, by case."""
    _warm_up(args, shape, args.cases)
    inputs = _inputs(args, shape)
    cases = {name: inputs.case(name) for name in args.cases}
    taken: dict[str, list[_Taken]] = {name: [] for name in cases}
    started = time.perf_counter()
    for turn in range(args.turns):
        if turn >= LEAST_TURNS and time.perf_counter() - started > args.seconds:
            break
        shift = turn % len(cases)
        for name in [*cases][shift:] + [*cases][:shift]:
            inputs.hidden.grad = inputs.weight.grad = None
            taken[name].append(_timed(cases[name], args.device))
    return taken


def _timed(case: Callable[[], torch.Tensor], device: str) -> _Taken:
    _wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    case().backward()
    _wait(device)
    return _Taken(time.perf_counter() - wall, time.process_time() - cpu)


def _warm_up(args: argparse.Namespace, shape: Shape, names: Sequence[str]) -> None:
    """Loads the libraries."""
    tiny = Shape(8, shape.vocab_size, shape.hidden_size)
    for name in names:
        _inputs(args, tiny).case(name)().backward()


def _inputs(args: argparse.Namespace, shape: Shape) -> Inputs:
    return Inputs(shape, args.device, getattr(torch, args.dtype), args.chunk_tokens or None)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak(args: argparse.Namespace, shape: str, name: str) -> int:
    """Bytes that one forward and backward of a case takes at most, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.loss", "--peak-of", name, "--shapes", shape]
    for option in ("chunk_tokens", "device", "dtype", "threads"):
        command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    # Arrays go back to the system as they are freed, so that the resident set is what is in use.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    return int(done.stdout)


def _peak_here(args: argparse.Namespace, shape: Shape) -> int:
    _warm_up(args, shape, [args.peak_of])
    case = _inputs(args, shape).case(args.peak_of)
    if args.device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case().backward()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated()) - before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is now what is held
    before = _peak_resident()
    case().backward()
    return _peak_resident() - before


def _peak_resident() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def _row(name: str, taken: dict[str, list[_Taken]], peaks: dict[str, int]) -> dict[str, float]:
    pairs = list(zip(taken[name], taken[CROSS_ENTROPY], strict=True))
    return {
        "turns": len(pairs),
        "seconds": statistics.median(ours.wall_s for ours, _ in pairs),
        "over_ce_time": statistics.median(ours.wall_s / ce.wall_s for ours, ce in pairs),
        "over_ce_cpu_time": statistics.median(ours.cpu_s / ce.cpu_s for ours, ce in pairs),
        "peak_bytes": peaks[name],
        "over_ce_peak_memory": peaks[name] / peaks[CROSS_ENTROPY],
    }


def _show(rows: dict[str, dict[str, float]]) -> None:
    print(f"  {'':14} {'ms':>9} {'over CE':>8} {'in CPU s':>8} {'peak MiB':>9} {'over CE':>8}")
    for name, row in rows.items():
        print(
            f"  {name:14} {1e3 * row['seconds']:9.1f} {row['over_ce_time']:8.3f} "
            f"{row['over_ce_cpu_time']:8.3f} {row['peak_bytes'] / MIB:9.1f} "
            f"{row['over_ce_peak_memory']:8.3f}"
        )
    print(flush=True)


if __name__ == "__main__":
    main()
