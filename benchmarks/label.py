"""What labelling costs over plain prefill: `python -m benchmarks.label --json out.json`.

Of each model, in one process with one engine, taking turns: plain prefill; vLLM's own prompt
log-probabilities, as dictionaries and flat; ours, from requests to committed Parquet, K = 64 and a
threshold that keeps about 12 ids; and the floor. The models are the demo's teacher and a random one
of a realistic shape (`wide`: d = 1024, 28 layers, V = 152k). Printed and left as JSON, by model:

- `plain_tokens_per_s`, `stock_tokens_per_s`, `labelled_tokens_per_s`: medians;
- `limit`: what labelling can reach of plain prefill. `gemm`: 1 / (1 + V d / parameters of the
  body). `gemm_and_logsumexp`: as measured, with the head's product and a logsumexp at every label;
- `efficiency_over_limit`: labelled over plain tokens/s, over the second limit; the same of the
  least times of all repeats (`..._of_least_times`), which says more on a machine that others use;
- `host_us_per_label`: CPU time of the host outside the engine, on the arrays that the engine
  shipped, in a process of its own: unpack, assemble, check, write, commit; by parts;
- `generation`: two responses a prompt, generated, then scored and committed.
"""

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.label_cases import MODELS, records
from benchmarks.label_host import host_us_per_label

HOST_REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.label", description=__doc__)
    parser.add_argument("--json", metavar="PATH", help="also write the figures there")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--tokens", type=int, help="of the rows of a model; default: by model")
    parser.add_argument("--row-tokens", type=int, default=256, help="of a random row")
    parser.add_argument("--unit-rows", type=int, default=16, help="rows of one commit")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=8, help="of the generation row")
    args = parser.parse_args()
    figures: dict[str, dict[str, Any]] = {}
    for model in args.models:
        for name, value in _measure(model, args).items():
            figures.setdefault(name, {})[model] = value
        _show(model, figures)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _measure(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one model: the engine's from a child, the host's from here."""
    tokens = args.tokens or {"demo": 32_768, "wide": 2_048}[model]
    sizes = {
        "tokens": tokens,
        "row-tokens": args.row_tokens,
        "unit-rows": args.unit_rows,
        "repeats": args.repeats,
        "prompts": args.prompts,
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.label_engine", "--model", model]
        command += ["--out", folder]
        for name, value in sizes.items():
            command += [f"--{name}", str(value)]
        subprocess.run(command, check=True, env=os.environ)
        out = Path(folder)
        figures: dict[str, Any] = json.loads((out / f"{model}.json").read_text(encoding="utf-8"))
        with open(out / f"{model}.pickle", "rb") as file:
            rows, labels = pickle.load(file)
    vocab_size = figures.pop("vocab_size")
    figures["host_us_per_label"] = {
        name: host_us_per_label(
            rows, labels[name], record, vocab_size, args.unit_rows, HOST_REPEATS
        )
        for name, record in records(model).items()
    }
    figures["ids_per_label"] = {
        name: sum(int((row.head_len + row.tail_len).sum()) for row in labels[name])
        / rows.num_labels
        for name in labels
    }
    return figures


def _show(model: str, figures: dict[str, dict[str, Any]]) -> None:
    mine = {name: by_model[model] for name, by_model in figures.items()}
    limit = mine["limit"]
    print(f"{model}: {mine['num_tokens']:,} tokens")
    print(f"  plain prefill {mine['plain_tokens_per_s']:>12,.0f} tokens/s")
    for name, speed in mine["stock_tokens_per_s"].items():
        print(f"  stock {name:<8}{speed:>12,.0f}")
    for name, speed in mine["labelled_tokens_per_s"].items():
        host = mine["host_us_per_label"][name]
        parts = ", ".join(f"{part} {us:.2f}" for part, us in host.items() if part != "total")
        print(
            f"  {name:<14}{speed:>12,.0f}  efficiency {mine['efficiency'][name]:.3f}, over its "
            f"limit {mine['efficiency_over_limit'][name]:.3f} (least times "
            f"{mine['efficiency_over_limit_of_least_times'][name]:.3f}); "
            f"{mine['ids_per_label'][name]:.1f} "
            f"ids; host {host['total']:.2f} us a label ({parts})"
        )
    print(f"  limits: GEMM {limit['gemm']:.3f}, with logsumexp {limit['gemm_and_logsumexp']:.3f}")
    made = mine["generation"]
    print(
        f"  n = {made['n']:.0f}: {made['tokens_per_s']:,.0f} tokens/s generated, scored and "
        f"committed; {made['generate_s']:.2f} s of {made['generate_and_score_s']:.2f} s generating"
    )


if __name__ == "__main__":
    main()
