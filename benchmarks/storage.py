"""What labels cost on disk, and what rounding them costs: `python -m benchmarks.storage`.

Labels are those of the demo's teacher on held-out text; `threshold_12` and `sampled_12` are set so
that they keep 12 ids a label. Printed and left as JSON, by record kind:

- bytes a label, column by column, as `write_shard` writes them (`bytes_per_label`);
- the KL on head and tail bucket that rounding to `logprob_bits` adds (`kl_added_by_rounding`);
- bytes of the entries over the order-0 entropy of their ids and log-probabilities, each column by
  itself (`over_entropy_bound`), and what a format that packs the same content into bits would take;
- tokens/s of writing and of reading on one core, in one run with each other.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.demo_labels import TokenRows, label, real_rows
from benchmarks.rounding_kl import rounding_kl
from labeler.teachers.protocol import RowLabels
from labeler.units.assemble import assemble_rows
from schemas.keys import content_key, stack_keys
from schemas.label_set.shards import read_shard, write_shard
from schemas.record.rows import LabelRows
from schemas.spec import RecordSpec
from schemas.storage.store import Store

VOCAB_SIZE = 4096
IDS_PER_LABEL = 12.0
BITS = (10, 9, 8, 7, 6, 5)
OPTIONAL = ("entropy", "lse", "teacher_context")
REPEATS = 5


@dataclass(frozen=True)
class Kind:
    """A record kind under test: its spec, and its labels before rounding."""

    name: str
    record: RecordSpec
    labels: Sequence[RowLabels]

    @property
    def ids_per_label(self) -> float:
        return _mean_entries(self.labels)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.storage", description=__doc__)
    parser.add_argument("--json", metavar="PATH", help="also write the figures there")
    parser.add_argument("--labels", type=int, default=40_000, help="labels to measure on")
    args = parser.parse_args()
    figures = measure(args.labels)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure(num_labels: int) -> dict[str, Any]:
    """All figures, printed as they come."""
    rows = real_rows(num_labels)
    print(f"{rows.num_labels} labels in {len(rows.token_ids)} rows of the demo's held-out text\n")
    kinds = [
        _kind("topk_64", rows, RecordSpec(kind="topk", k=64, entropy=False)),
        _kind("threshold_12", rows, _with_12_ids(rows, "tau")),
        _kind("sampled_12", rows, _with_12_ids(rows, "draws")),
    ]
    figures: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "num_labels": rows.num_labels}
    for kind in kinds:
        measured = _measure_kind(kind, rows)
        for name, value in measured.items():
            figures.setdefault(name, {})[kind.name] = value
    return figures


def _kind(name: str, rows: TokenRows, record: RecordSpec) -> Kind:
    return Kind(name, record, label(rows, record))


def _with_12_ids(rows: TokenRows, field: str) -> RecordSpec:
    """The record of 12 ids a label, found on a part of the rows."""
    every = max(1, len(rows.token_ids) // 12)
    some = TokenRows(rows.token_ids[::every], rows.label_spans[::every], rows.row_keys[::every])
    make: Callable[[float], RecordSpec]
    if field == "tau":
        make = lambda x: RecordSpec(kind="threshold", tau=1 / x, entropy=False)  # noqa: E731
    else:
        make = lambda x: RecordSpec(kind="sampled", draws=round(x), entropy=False)  # noqa: E731
    low, high = 4.0, 200.0
    while high / low > 1.01 and (field == "tau" or high - low > 1):
        middle = math.sqrt(low * high)
        if _mean_entries(label(some, make(middle))) < IDS_PER_LABEL:
            low = middle
        else:
            high = middle
    return make(low)


def _mean_entries(labels: Sequence[RowLabels]) -> float:
    entries = sum(int((row.head_len + row.tail_len).sum()) for row in labels)
    return entries / sum(row.num_labels for row in labels)


def _measure_kind(kind: Kind, rows: TokenRows) -> dict[str, Any]:
    by_bits = {bits: _kl_added(kind, rows, bits) for bits in BITS}
    stored = _assembled(kind, rows, kind.record)
    with tempfile.TemporaryDirectory() as folder:
        columns, write_s, read_s = _written(stored, kind.record, folder)
        sizes = {}
        for bits in BITS:
            record = kind.record.model_copy(update={"logprob_bits": bits})
            sizes[bits] = sum(_written(_assembled(kind, rows, record), record, folder)[0].values())
    num_labels = stored.num_labels
    entries = ("entry_ids", "entry_logprobs", "entry_counts")
    entry_bytes = sum(columns.get(name, 0.0) for name in entries)
    bound = _entropy_bytes(stored) / num_labels
    result = {
        "ids_per_label": kind.ids_per_label,
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


def _assembled(kind: Kind, rows: TokenRows, record: RecordSpec) -> LabelRows:
    content = [content_key(*p) for p in zip(rows.token_ids, rows.label_spans, strict=True)]
    return assemble_rows(
        rows.row_keys, stack_keys(content), rows.token_ids, rows.label_spans, kind.labels, record
    )


def _written(
    rows: LabelRows, record: RecordSpec, folder: str
) -> tuple[dict[str, float], float, float]:
    """Bytes a label by column, and the least CPU seconds that writing and reading took."""
    store = Store(folder)
    write_s, read_s = [], []
    for _ in range(REPEATS):
        store.delete("shard.parquet")
        started = time.process_time()
        write_shard(store, "shard.parquet", rows, record, "benchmark", VOCAB_SIZE)
        write_s.append(time.process_time() - started)
        started = time.process_time()
        read_shard(store, "shard.parquet", record)
        read_s.append(time.process_time() - started)
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
    """Mean nats a label of KL(before rounding, after it) on the partition that is stored."""
    stored = _assembled(kind, rows, kind.record.model_copy(update={"logprob_bits": bits}))
    return float(rounding_kl(kind.labels, stored, kind.record).mean())


def _entropy_bytes(rows: LabelRows) -> float:
    """Order-0 entropy of the entries' columns, each by itself, in bytes."""
    total = 0.0
    for name in ("entry_ids", "entry_logprobs", "entry_counts"):
        values = getattr(rows, name)
        if values is not None and len(values):
            _, counts = np.unique(values, return_counts=True)
            share = counts / len(values)
            total += -(share * np.log2(share)).sum() * len(values) / 8
    return total


def _bit_packed(rows: LabelRows, record: RecordSpec) -> float:
    """Bytes of the same content with as many bits as each value needs, and no compression."""
    id_bits = math.ceil(math.log2(VOCAB_SIZE))
    logprob_bits = 5 + record.logprob_bits  # no sign: it is never positive
    assert rows.entry_offsets is not None
    num_draws = 0 if rows.entry_counts is None else len(rows.entry_counts)
    count_bits = math.ceil(math.log2(record.draws + 1)) if num_draws else 0
    length_bits = math.ceil(math.log2(1 + int(np.diff(rows.entry_offsets).max())))
    lengths = 0 if record.kind == "topk" else 2 * length_bits
    label_bits = lengths + 2 * logprob_bits + id_bits  # tail, target and its rank
    bits = rows.num_entries * (id_bits + logprob_bits) + num_draws * count_bits
    return (bits + rows.num_labels * label_bits + rows.num_tokens * id_bits) / 8


def _show(kind: Kind, result: dict[str, Any]) -> None:
    settings = {"topk": "k", "threshold": "tau", "sampled": "draws"}[kind.record.kind]
    value = getattr(kind.record, settings)
    print(f"{kind.name}: {settings} = {value:.4g}, {result['ids_per_label']:.2f} ids a label")
    print(
        f"  bytes a label {result['bytes_per_label']:.1f}; packed into bits "
        f"{result['bit_packed_bytes_per_label']:.1f}; entries over their entropy "
        f"{result['over_entropy_bound']:.2f}"
    )
    columns = sorted(result["bytes_per_label_by_column"].items(), key=lambda item: -item[1])
    print("  " + ", ".join(f"{name} {size:.2f}" for name, size in columns))
    print("  bits kept:      " + " ".join(f"{bits:>9}" for bits in BITS))
    sizes, kls = result["bytes_per_label_by_bits"], result["kl_added_by_bits"]
    print("  bytes a label:  " + " ".join(f"{sizes[bits]:9.1f}" for bits in BITS))
    print("  KL by rounding: " + " ".join(f"{kls[bits]:9.1e}" for bits in BITS))
    print(
        f"  tokens/s on one core: written {result['write_tokens_per_s']:,.0f}, "
        f"read {result['read_tokens_per_s']:,.0f}\n"
    )


if __name__ == "__main__":
    main()
