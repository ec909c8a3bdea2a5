"""`tutelage labels export`: sampled responses as chats, or labels for other trainers, as files."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.labels.export.chats import Chats
from cluster.labels.export.layouts import (
    axolotl_table,
    check_exportable,
    compression_config,
    distillkit_table,
    is_wholly_labelled,
)
from cluster.labels.export.rows import rows_once
from schemas.config import StrictModel
from schemas.errors import ConfigError, StoreError
from schemas.label_set.label_set import LabelSet
from schemas.storage.store import Store

CHAT = pa.schema(
    [
        (
            "messages",
            pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
        ),
        ("row_key", pa.string()),
        ("source", pa.string()),
        ("place", pa.int64()),
        ("sample", pa.int32()),
    ]
)


class Exported(StrictModel):
    """What was written.

    Attributes:
        files: paths, in order.
        note: what a reader of the files has to know.
    """

    format: str
    out: str
    rows: int
    files: list[str]
    note: str


def export(url: str, out: str, layout: str, tokenizer: str | None) -> Exported:
    """Writes a label set in another layout.

    Args:
        url: of the label set.
        out: a file for chats, a folder for labels.
        layout: chat-jsonl, chat-parquet, axolotl or distillkit.
        tokenizer: folder or hub name, for chats; None: the teacher's, where provenance has it.

    Raises:
        RecordError: the layout cannot say what the set holds.
        ConfigError: the set has no sampled responses, or no tokenizer can be found.
        StoreError: something cannot be read or written.
    """
    label_set = LabelSet.open(url)
    if layout.startswith("chat"):
        return _export_chats(label_set, out, layout, tokenizer)
    check_exportable(label_set.spec, layout)
    write = {"axolotl": _axolotl, "distillkit": _distillkit}[layout]
    return write(label_set, out)


def _export_chats(label_set: LabelSet, out: str, layout: str, tokenizer: str | None) -> Exported:
    chats = Chats(label_set, tokenizer)
    folder, slash, name = out.rpartition("/")
    if not name:
        raise ConfigError(f"{out}: expected the path of a file")
    store = Store(folder if slash else ".")
    rows = 0
    with _Replacing(store, name) as file:
        writer = None
        for batch in rows_once(label_set):
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
    note = "messages of each prompt and its response; special tokens are left out of the response"
    return Exported(format=layout, out=out, rows=rows, files=[out], note=note)


def _axolotl(label_set: LabelSet, out: str) -> Exported:
    store = Store(out)
    rows, files = _write_tables(store, label_set, lambda batch: axolotl_table(batch))
    note = (
        "already tokenised: no `type` for the dataset; kd_temperature: 1 and "
        "kd_normalize_topk: false (log-probabilities are the teacher's own, not renormalised)"
    )
    config = (
        "# The part of an axolotl configuration that reads these files.\n"
        "plugins:\n  - axolotl.integrations.kd.KDPlugin\n"
        "kd_trainer: true\nkd_alpha: 0.9\nkd_ce_alpha: 0.1\n"
        "kd_temperature: 1.0  # rows hold log-probabilities at temperature 1\n"
        "kd_normalize_topk: false  # they are the teacher's own, and do not sum to 1\n"
        f"datasets:\n  - path: {out}\n    ds_type: parquet\n    type:\n"
    )
    store.write_bytes("axolotl.yaml", config.encode())
    return Exported(format="axolotl", out=out, rows=rows, files=[*files, "axolotl.yaml"], note=note)


def _distillkit(label_set: LabelSet, out: str) -> Exported:
    store = Store(out)
    vocab_size = label_set.spec.teacher.vocab_size
    whole = all(is_wholly_labelled(batch) for batch in rows_once(label_set))

    def table(batch: Any) -> pa.Table:
        found = distillkit_table(batch, vocab_size)
        return found.drop_columns(["labels"]) if whole else found

    rows, files = _write_tables(store, label_set, table)
    k = min(label_set.spec.record.k, vocab_size)
    lines = _yaml(compression_config(k, vocab_size))
    store.write_bytes("compression_config.yaml", ("\n".join(lines) + "\n").encode())
    masked = (
        ""
        if whole
        else "#\n# Not every token has a label. DistillKit masks the teacher's row j by labels[j], "
        "so the\n# column `labels` says where there is a teacher; give cross_entropy the weight 0, "
        "because\n# as hard labels that column is one token early.\n"
    )
    config = (
        "# The part of a DistillKit configuration that reads these files. Sequences go without\n"
        "# their last token, so that each row is a teacher's distribution over the next token.\n"
        f"{masked}teacher:\n  kind: dataset\n  logprob_compressor:\n"
        + "\n".join(f"    {line}" for line in lines)
        + "\n"
    )
    store.write_bytes("distillkit.yaml", config.encode())
    note = "sequences go without their last token; every log-probability is exact"
    if not whole:
        note += "; `labels` masks the teacher's rows and is no hard label: cross_entropy weight 0"
    names = [*files, "compression_config.yaml", "distillkit.yaml"]
    return Exported(format="distillkit", out=out, rows=rows, files=names, note=note)


def _write_tables(
    store: Store, label_set: LabelSet, table: Callable[[Any], pa.Table]
) -> tuple[int, list[str]]:
    """One file for each row group, so that no more than one is in memory."""
    rows, files = 0, []
    for number, found in enumerate(_tables(label_set, table)):
        name = f"data_{number:05d}.parquet"
        with _Replacing(store, name) as file:
            pq.write_table(found, file, compression="zstd")
        rows += len(found)
        files.append(name)
    return rows, files


def _tables(label_set: LabelSet, table: Callable[[Any], pa.Table]) -> Iterator[pa.Table]:
    for batch in rows_once(label_set):
        yield table(batch)


class _Replacing:
    """A file that is whole when it has its name: written beside it, then moved."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name
        self._partial = f"{name}.partial" if store.is_local else name

    def __enter__(self) -> Any:
        self._file = self._store.open(self._partial, "wb")
        return self._file

    def __exit__(self, kind: object, *_: object) -> None:
        self._file.close()
        if kind is not None:
            self._store.delete(self._partial)
        elif self._store.is_local:
            try:
                self._store.fs.mv(self._store.path(self._partial), self._store.path(self._name))
            except OSError as error:
                raise StoreError(f"{self._store.path(self._name)}: {error}") from error


def _yaml(fields: dict[str, Any]) -> list[str]:
    """Plain values: JSON's spelling of them is YAML too."""
    return [
        f"{name}: {value if isinstance(value, str) else json.dumps(value)}"
        for name, value in fields.items()
    ]
