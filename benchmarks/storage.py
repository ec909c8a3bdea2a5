"""Bytes per label on disk, and the error of rounding: ``python -m benchmarks.storage``.

Labels are the demo teacher's on held-out text; ``threshold_12`` and ``sampled_12`` keep 12 ids per
label. Results, by kind of record:

- bytes per label, by column, as `write_shard` writes them (``bytes_per_label``);
- the KL on head and tail bucket that rounding to ``logprob_bits`` adds (``kl_added_by_rounding``);
- bytes of the entries over the order-0 entropy of their ids and log-probabilities, column by column
  (``over_entropy_bound``), and the size of the same content packed into bits;
- tokens per CPU second of writing and reading, measured in the same run.
"""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.demo_labels import TokenRows, ids_per_label, label, real_rows
from benchmarks.harness import command_line, timed, write_results
from benchmarks.records import TOPK_64, described, sampled_record, threshold_record
from benchmarks.rounding_kl import rounding_kl
from labeler.teachers.protocol import RowLabels
from schemas.console.text import table
from schemas.label_set.shards import read_row_group, write_shard
from schemas.record.rows import LabelRows
from schemas.spec import RecordSpec
from schemas.storage.store import Store

VOCAB_SIZE = 4096
BITS = (10, 9, 8, 7, 6, 5)
OPTIONAL = ("entropy", "lse", "teacher_context")
REPEATS = 5


@dataclass(frozen=True)
class Kind:
    """A measured kind of record: its spec, and its labels before rounding."""

    name: str
    record: RecordSpec
    labels: Sequence[RowLabels]


def main() -> None:
    parser = command_line("storage", __doc__)
    parser.add_argument("--labels", type=int, default=40_000, help="labels to measure on")
    args = parser.parse_args()
    write_results(args, measure(args.labels))


def measure(num_labels: int) -> dict[str, Any]:
    """Measures everything and prints results as they arrive."""
    rows = real_rows(num_labels)
    print(f"{rows.num_labels} labels in {len(rows.token_ids)} rows of the demo's held-out text\n")
    records = {
        "topk_64": TOPK_64,
        "threshold_12": threshold_record(rows),
        "sampled_12": sampled_record(rows),
    }
    results: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "num_labels": rows.num_labels}
    for name, record in records.items():
        measured = _measure_kind(Kind(name, record, label(rows, record)), rows)
        for field, value in measured.items():
            results.setdefault(field, {})[name] = value
    return results


def _measure_kind(kind: Kind, rows: TokenRows) -> dict[str, Any]:
    by_bits = {bits: _kl_added(kind, rows, bits) for bits in BITS}
    stored = rows.assembled(kind.labels, kind.record)
    with tempfile.TemporaryDirectory() as folder:
        columns, write_s, read_s = _measure_shard(stored, kind.record, folder)
        sizes = {}
        for bits in BITS:
            record = kind.record.model_copy(update={"logprob_bits": bits})
            rounded = rows.assembled(kind.labels, record)
            sizes[bits] = sum(_measure_shard(rounded, record, folder)[0].values())
    num_labels = stored.num_labels
    entries = ("entry_ids", "entry_logprobs", "entry_counts")
    entry_bytes = sum(columns.get(name, 0.0) for name in entries)
    bound = _entropy_bytes(stored) / num_labels
    result = {
        "record": described(kind.record),
        "ids_per_label": ids_per_label(kind.labels),
        "logprob_bits": kind.record.logprob_bits,
        "bytes_per_label": sum(columns.values()),
        "bytes_per_label_by_column": columns,
        "bytes_per_label_by_bits": sizes,
        "kl_added_by_rounding": by_bits[kind.record.logprob_bits],
        "kl_added_by_bits": by_bits,
        "over_entropy_bound": entry_bytes / bound,
        "bit_packed_bytes_per_label": _bit_packed(stored, kind.record) / num_labels,
        "write_tokens_per_s": stored.num_tokens / write_s,
        "read_tokens_per_s": stored.num_tokens / read_s,
    }
    _show(kind, result)
    return result


def _read_shard(store: Store, record: RecordSpec) -> None:
    with pq.ParquetFile(store.path("shard.parquet")) as file:
        num_groups = file.num_row_groups
    for index in range(num_groups):
        read_row_group(store, "shard.parquet", index, record)


def _measure_shard(
    rows: LabelRows, record: RecordSpec, folder: str
) -> tuple[dict[str, float], float, float]:
    """Bytes per label by column, and the minimum CPU seconds of writing and of reading."""
    store = Store(folder)
    write_s, read_s = [], []
    for _ in range(REPEATS):
        store.delete("shard.parquet")
        write = partial(write_shard, store, "shard.parquet", rows, record, "benchmark", VOCAB_SIZE)
        write_s.append(timed(write).cpu_s)
        read_s.append(timed(partial(_read_shard, store, record)).cpu_s)
    columns: dict[str, float] = {}
    metadata = pq.ParquetFile(store.path("shard.parquet")).metadata
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(index)
            name = chunk.path_in_schema.split(".")[0]
            if name not in OPTIONAL:
                size = chunk.total_compressed_size / rows.num_labels
                columns[name] = columns.get(name, 0.0) + size
    return columns, min(write_s), min(read_s)


def _kl_added(kind: Kind, rows: TokenRows, bits: int) -> float:
    """Mean KL(before, after rounding) per label over head and tail bucket, nats."""
    record = kind.record.model_copy(update={"logprob_bits": bits})
    stored = rows.assembled(kind.labels, record)
    return float(rounding_kl(kind.labels, stored, kind.record).mean())


def _entropy_bytes(rows: LabelRows) -> float:
    """Sum of the order-0 entropies of the entries' columns, in bytes."""
    total = 0.0
    for name in ("entry_ids", "entry_logprobs", "entry_counts"):
        values = getattr(rows, name)
        if values is not None and len(values):
            _, counts = np.unique(values, return_counts=True)
            share = counts / len(values)
            total += -(share * np.log2(share)).sum() * len(values) / 8
    return total


def _bit_packed(rows: LabelRows, record: RecordSpec) -> float:
    """Bytes of the same content with the fewest bits per value, uncompressed."""
    id_bits = math.ceil(math.log2(VOCAB_SIZE))
    logprob_bits = 5 + record.logprob_bits  # no sign bit: never positive
    assert rows.entry_offsets is not None
    num_draws = 0 if rows.entry_counts is None else len(rows.entry_counts)
    count_bits = math.ceil(math.log2(record.draws + 1)) if num_draws else 0
    length_bits = math.ceil(math.log2(1 + int(np.diff(rows.entry_offsets).max())))
    lengths = 0 if record.kind == "topk" else 2 * length_bits
    label_bits = lengths + 2 * logprob_bits + id_bits  # tail, target and its rank
    bits = rows.num_entries * (id_bits + logprob_bits) + num_draws * count_bits
    return (bits + rows.num_labels * label_bits + rows.num_tokens * id_bits) / 8


def _show(kind: Kind, result: dict[str, Any]) -> None:
    print(f"{kind.name}: {described(kind.record)}, {result['ids_per_label']:.2f} ids per label")
    print(
        f"bytes per label {result['bytes_per_label']:.1f}; packed into bits "
        f"{result['bit_packed_bytes_per_label']:.1f}; entries over their entropy "
        f"{result['over_entropy_bound']:.2f}"
    )
    columns = sorted(result["bytes_per_label_by_column"].items(), key=lambda item: -item[1])
    print(", ".join(f"{name} {size:.2f}" for name, size in columns))
    sizes, kls = result["bytes_per_label_by_bits"], result["kl_added_by_bits"]
    lines = [(str(bits), f"{sizes[bits]:.1f}", f"{kls[bits]:.1e}") for bits in BITS]
    print(table(("bits kept", "bytes per label", "KL of rounding"), lines, right=(0, 1, 2)))
    print(
        f"tokens per CPU second: written {result['write_tokens_per_s']:,.0f}, "
        f"read {result['read_tokens_per_s']:,.0f}\n"
    )


if __name__ == "__main__":
    main()
