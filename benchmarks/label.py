"""What labelling costs over plain prefill: `python -m benchmarks.label --json out.json`.

Of each model, in one process with one engine, taking turns: plain prefill; vLLM's own prompt
log-probabilities, as dictionaries and flat; ours, from requests to committed Parquet, K = 64 and a
threshold that keeps about 12 ids; and the floor. The models are the demo's teacher and a random one
of a realistic shape (`wide`: d = 1024, 28 layers, V = 152k). Printed and left as JSON, by model:

- `plain_tokens_per_s`, `labelled_tokens_per_s`, `stock_tokens_per_s`: medians;
- `limit`: what labelling can reach of plain prefill, as measured, with the engine's own product of
  the head and the fastest logsumexp that we know at every label; `limit_gemm`: 1 / (1 + V d /
  parameters of the body);
- `efficiency_over_limit`: labelled over plain tokens/s, over `limit`; the same of the least times
  of all repeats (`..._of_least_times`), which says more on a machine that others use;
- `host_us_per_label`: CPU time of the host outside the engine, on the arrays that the engine
  shipped, in a process of its own: unpack, assemble, check, write, commit;
- `generation`: two responses a prompt; plain is generation alone, labelled is generated, scored and
  committed, and the limit is what plain prefill and floor of the responses add;
- `records`: these figures by kind of record, the parts of the host's work, and what the thread that
  drives the engine spends its time on. What stands above is of the K most probable ids.
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

from benchmarks.demo_labels import ids_per_label
from benchmarks.label_cases import MODELS, records
from benchmarks.label_host import host_us_per_label
from labeler.run.openmp_env import openmp_env

HOST_REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.label", description=__doc__)
    parser.add_argument("--json", metavar="PATH", help="also write the figures there")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--tokens", type=int, help="of the rows of a model; default: by model")
    parser.add_argument("--row-tokens", type=int, default=256, help="of a random row")
    parser.add_argument(
        "--unit-rows", type=int, default=16, help="rows of one commit of the engine"
    )
    parser.add_argument(
        "--host-unit-rows", type=int, default=128, help="the same for the host's work alone"
    )
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
        # The floor travels as a function, also to an engine in a process of its own.
        environment = {**openmp_env(), "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
        subprocess.run(command, check=True, env={**os.environ, **environment})
        out = Path(folder)
        figures: dict[str, Any] = json.loads((out / f"{model}.json").read_text(encoding="utf-8"))
        with open(out / f"{model}.pickle", "rb") as file:
            rows, labels = pickle.load(file)
    vocab_size = figures.pop("vocab_size")
    for name, record in records(model).items():
        mine = figures["records"][name]
        mine["host_us_per_label"] = host_us_per_label(
            rows, labels[name], record, vocab_size, args.host_unit_rows, HOST_REPEATS
        )
        mine["ids_per_label"] = ids_per_label(labels[name])
    first = figures["records"][next(iter(records(model)))]
    return {**figures, "host_us_per_label": first["host_us_per_label"]["total"]}


def _show(model: str, figures: dict[str, dict[str, Any]]) -> None:
    mine = {name: by_model[model] for name, by_model in figures.items()}
    print(f"{model}: {mine['num_tokens']:,} tokens")
    print(f"  plain prefill {mine['plain_tokens_per_s']:>12,.0f} tokens/s")
    for name, speed in mine["stock_tokens_per_s"].items():
        print(f"  stock {name:<8}{speed:>12,.0f}")
    for name, one in mine["records"].items():
        host = one["host_us_per_label"]
        parts = ", ".join(f"{part} {us:.2f}" for part, us in host.items() if part != "total")
        print(
            f"  {name:<14}{one['labelled_tokens_per_s']:>12,.0f}  efficiency "
            f"{one['efficiency']:.3f}, over its limit {one['efficiency_over_limit']:.3f} (least "
            f"times {one['efficiency_over_limit_of_least_times']:.3f}); "
            f"{one['ids_per_label']:.1f} ids; host {host['total']:.2f} us a label ({parts})"
        )
        where = ", ".join(f"{part} {us:.1f}" for part, us in one["profile_us"].items())
        print(f"    us a token on the engine's thread: {where}")
    print(f"  limits: GEMM {mine['limit_gemm']:.3f}, with logsumexp {mine['limit']:.3f}")
    made = mine["generation"]
    print(
        f"  n = {made['n']}: {made['plain_tokens_per_s']:,.0f} tokens/s generated, "
        f"{made['labelled_tokens_per_s']:,.0f} generated, scored and committed; efficiency "
        f"{made['efficiency']:.3f}, over its limit of {made['limit']:.3f} "
        f"{made['efficiency_over_limit']:.3f}"
    )


if __name__ == "__main__":
    main()
