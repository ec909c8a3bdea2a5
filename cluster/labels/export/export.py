"""`tutelage labels export`: sampled responses as chats, or labels in other trainers' layouts."""

import json
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.labels.export.chats import Chats
from cluster.labels.export.layouts import (
    axolotl_table,
    check_exportable,
    distillkit_table,
    is_fully_labelled,
)
from cluster.labels.export.rows import unique_rows
from cluster.output_file import split_url
from schemas.config import StrictModel
from schemas.console.progress import ProgressCallback
from schemas.errors import ConfigError, StoreError
from schemas.label_set.label_set import LabelSet
from schemas.record.rows import LabelRows
from schemas.storage.store import Store

Written = tuple[int, list[str], str]  # rows, files, note, as in Exported

CHAT = pa.schema(
    [
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("row_key", pa.string()),
        ("source", pa.string()),
        ("place", pa.int64()),
        ("sample", pa.int32()),
    ]
)

_AXOLOTL_CONFIG = """\
# The part of an axolotl configuration that reads these files.
plugins:
  - axolotl.integrations.kd.KDPlugin
kd_trainer: true
kd_alpha: 0.9
kd_ce_alpha: 0.1
kd_temperature: 1.0  # rows hold log-probabilities at temperature 1
kd_normalize_topk: false  # they are the teacher's own, and do not sum to 1
datasets:
  - path: {out}
    ds_type: parquet
    type:
"""
_DISTILLKIT_CONFIG = """\
# The part of a DistillKit configuration that reads these files. Sequences lack their last token,
# because each row is the teacher's distribution over the next token.
{masked}teacher:
  kind: dataset
  logprob_compressor:
{compressor}"""
_DISTILLKIT_MASKED = """\
#
# Not every token has a label. DistillKit masks the teacher's row j by labels[j], so the column
# `labels` marks the rows with a teacher; give cross_entropy the weight 0, because as hard labels
# that column is one token early.
"""
# DistillKit's teacher.logprob_compressor for these files: K values, each exact.
_COMPRESSOR_CONFIG = """\
d: {vocab_size}
k: {k}
exact_k: {k}
exact_dtype: float16
polynomial_terms: null
term_dtype: float32
residual_bins: []
delta_encoding: false
error_diffusion: false
normalize_t: false
"""


class Exported(StrictModel):
    """The files of an export.

    Attributes:
        files: paths, in order.
        note: what readers of the files must know.
    """

    format: str
    out: str
    rows: int
    files: list[str]
    note: str


def export(
    url: str, out: str, layout: str, tokenizer: str | None, progress: ProgressCallback | None = None
) -> Exported:
    """Writes a label set in another layout.

    Args:
        url: the label set.
        out: a file for chats, a folder for labels.
        layout: chat-jsonl, chat-parquet, axolotl or distillkit.
        tokenizer: folder or hub name, for chats; None: the recorded teacher's.
        progress: called with the number of rows written so far, and in all.

    Raises:
        RecordError: the layout cannot represent the set's labels, or the set is empty.
        ConfigError: the set has no sampled responses, or no tokenizer can be loaded.
        StoreError: a file cannot be read or written.
    """
    label_set = LabelSet.open(url)
    if layout.startswith("chat"):
        rows, files, note = _export_chats(label_set, out, layout, tokenizer, progress)
    else:
        check_exportable(label_set.spec, layout)
        write = {"axolotl": _export_axolotl, "distillkit": _export_distillkit}[layout]
        rows, files, note = write(label_set, out, progress)
    return Exported(format=layout, out=out, rows=rows, files=files, note=note)


def _export_chats(
    label_set: LabelSet,
    out: str,
    layout: str,
    tokenizer: str | None,
    progress: ProgressCallback | None,
) -> Written:
    chats = Chats(label_set, tokenizer)
    store, name = split_url(out)
    if not name:
        raise ConfigError(f"{out}: expected the path of a file")
    rows = 0
    with _replaced_file(store, name) as file:
        writer = None
        for batch in unique_rows(label_set, progress):
            found = chats.rows(batch)
            rows += len(found)
            if layout == "chat-jsonl":
                for row in found:
                    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                continue
            writer = writer or pq.ParquetWriter(file, CHAT, compression="zstd")
            writer.write_table(pa.Table.from_pylist(found, schema=CHAT))
        if writer is not None:
            writer.close()
    note = "messages of each prompt and its response; responses lack their special tokens"
    return rows, [out], note


def _export_axolotl(label_set: LabelSet, out: str, progress: ProgressCallback | None) -> Written:
    store = Store(out)
    rows, files = _write_tables(store, label_set, axolotl_table, progress)
    store.write_bytes("axolotl.yaml", _AXOLOTL_CONFIG.format(out=out).encode())
    note = (
        "already tokenised: no `type` for the dataset; kd_temperature: 1 and "
        "kd_normalize_topk: false (log-probabilities are the teacher's own, not renormalised)"
    )
    return rows, [*files, "axolotl.yaml"], note


def _export_distillkit(label_set: LabelSet, out: str, progress: ProgressCallback | None) -> Written:
    store = Store(out)
    vocab_size = label_set.spec.teacher.vocab_size
    # All files need the same columns, so every row is read before the first file is written.
    is_full = all(is_fully_labelled(batch) for batch in unique_rows(label_set))

    def table(batch: LabelRows) -> pa.Table:
        found = distillkit_table(batch, vocab_size)
        return found.drop_columns(["labels"]) if is_full else found

    rows, files = _write_tables(store, label_set, table, progress)
    k = min(label_set.spec.record.k, vocab_size)
    compressor = _COMPRESSOR_CONFIG.format(k=k, vocab_size=vocab_size)
    config = _DISTILLKIT_CONFIG.format(
        masked="" if is_full else _DISTILLKIT_MASKED,
        compressor=textwrap.indent(compressor, "    "),
    )
    store.write_bytes("compression_config.yaml", compressor.encode())
    store.write_bytes("distillkit.yaml", config.encode())
    note = "sequences lack their last token; every log-probability is exact"
    if not is_full:
        note += "; `labels` only masks the teacher's rows: set the weight of cross_entropy to 0"
    return rows, [*files, "compression_config.yaml", "distillkit.yaml"], note


def _write_tables(
    store: Store,
    label_set: LabelSet,
    to_table: Callable[[LabelRows], pa.Table],
    progress: ProgressCallback | None,
) -> tuple[int, list[str]]:
    """Writes one file per row group, which bounds memory; returns the row count and the files."""
    rows, files = 0, []
    for number, batch in enumerate(unique_rows(label_set, progress)):
        name, table = f"data_{number:05d}.parquet", to_table(batch)
        with _replaced_file(store, name) as file:
            pq.write_table(table, file, compression="zstd")
        rows += len(table)
        files.append(name)
    return rows, files


@contextmanager
def _replaced_file(store: Store, name: str) -> Iterator[Any]:
    """Yields a file to stream to, which appears under its name only when complete."""
    # Object stores show a file only once it is closed; local files are renamed instead.
    partial = f"{name}.partial" if store.is_local else name
    try:
        with store.open(partial, "wb") as file:
            yield file
    except BaseException:
        store.delete(partial)
        raise
    if store.is_local:
        try:
            store.fs.mv(store.path(partial), store.path(name))
        except OSError as error:
            raise StoreError(f"{store.path(name)}: {error}") from error
