"""Cost of labelling over plain prefill: `python -m benchmarks.label`.

For each model, in one process with one engine, these take turns: plain prefill; vLLM's own prompt
log-probabilities, as dictionaries and flat; ours, from requests to committed Parquet, with K = 64
and with a threshold that keeps about 12 ids; and the floor. The models are the demo's teacher and a
random model of a realistic shape (`wide`: d = 1024, 28 layers, V = 152k). Results, by model:

- `plain_tokens_per_s`, `stock_tokens_per_s`: medians;
- `limit`: the share of plain prefill speed that labelling can reach, given the engine's own head
  matmul and the fastest logsumexp we know at every label; `floor_us_per_token`: their time;
- `records`, by kind of record:
  - `labelled_tokens_per_s`, median; `efficiency`, over plain prefill; `efficiency_over_limit`;
  - `profile_us`: time per token on the thread that drives the engine, by kind of work;
  - `host_us_per_label`: CPU time outside the engine, on the arrays that the engine returned;
  - `ids_per_label`.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest.mock import patch

from benchmarks.harness import command_line, write_results
from benchmarks.label_cases import MODELS, records
from benchmarks.label_engine import measure_engine
from benchmarks.label_host import host_us_per_label
from labeler.run.ray_cluster.openmp_env import openmp_env

HOST_REPEATS = 5


def main() -> None:
    parser = command_line("label", __doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--tokens", type=int, help="total tokens of the rows; default: by model")
    parser.add_argument("--row-tokens", type=int, default=256, help="tokens of a random row")
    parser.add_argument(
        "--unit-rows", type=int, default=16, help="rows per unit in the engine's process"
    )
    parser.add_argument(
        "--host-unit-rows", type=int, default=128, help="rows per unit on the host alone"
    )
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for model in args.models:
        figures = _measure(model, args)
        for name, value in figures.items():
            results.setdefault(name, {})[model] = value
        _show(model, figures)
    write_results(args, results)


def _measure(model: str, args: Any) -> dict[str, Any]:
    """Measures one model: the engine in a child process, the host's work in this one."""
    tokens = args.tokens or {"demo": 32_768, "wide": 2_048}[model]
    # The floor is sent to the engine as a function, even if the engine runs in another process.
    environment = {**openmp_env(), "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    spawn = multiprocessing.get_context("spawn")
    with patch.dict(os.environ, environment), ProcessPoolExecutor(1, spawn) as child:
        figures, rows, labels, vocab_size = child.submit(
            measure_engine, model, tokens, args.row_tokens, args.unit_rows, args.repeats
        ).result()
    for name, record in records(model).items():
        entries = sum(int((row.head_len + row.tail_len).sum()) for row in labels[name])
        figures["records"][name] |= {
            "ids_per_label": entries / rows.num_labels,
            "host_us_per_label": host_us_per_label(
                rows, labels[name], record, vocab_size, args.host_unit_rows, HOST_REPEATS
            ),
        }
    return figures


def _show(model: str, figures: dict[str, Any]) -> None:
    print(f"{model}: {figures['num_tokens']:,} tokens, limit {figures['limit']:.3f}")
    print(f"  plain prefill {figures['plain_tokens_per_s']:>12,.0f} tokens/s")
    for name, speed in figures["stock_tokens_per_s"].items():
        print(f"  stock {name:<8}{speed:>12,.0f}")
    for kind, one in figures["records"].items():
        print(
            f"  {kind:<14}{one['labelled_tokens_per_s']:>12,.0f}  efficiency "
            f"{one['efficiency']:.3f}, of the limit {one['efficiency_over_limit']:.3f}; "
            f"{one['ids_per_label']:.1f} ids"
        )
        for name, unit in (("profile_us", "token"), ("host_us_per_label", "label")):
            parts = ", ".join(f"{part} {us:.2f}" for part, us in one[name].items())
            print(f"    us a {unit}: {parts}")


if __name__ == "__main__":
    main()
