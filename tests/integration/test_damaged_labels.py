"""Every unit of a label set damaged in another way: one pass finds all, a job repairs them."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.__main__ import main
from labeler.config import LabelConfig
from labeler.run.job import run_label_job
from schemas.label_set.label_set import LabelSet
from schemas.label_set.manifest import Manifest
from schemas.label_set.shards import FINGERPRINT_KEY
from schemas.maintenance.verify import verify
from schemas.record import LabelRows
from schemas.record.columns import arrow_schema
from schemas.spec import RecordSpec
from tests.support.shards import read_shard

pytestmark = pytest.mark.usefixtures("ray_session")

RECORD = RecordSpec(kind="topk", k=8)


def flip(label_set: LabelSet, unit: Manifest) -> None:
    path = Path(label_set.store.path(unit.shard))
    names = label_set.spec.record.columns
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(names.index("entry_ids"))
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 1
    path.write_bytes(bytes(data))


def truncate(label_set: LabelSet, unit: Manifest) -> None:
    path = Path(label_set.store.path(unit.shard))
    path.write_bytes(path.read_bytes()[:-1])


def remove(label_set: LabelSet, unit: Manifest) -> None:
    label_set.store.delete(unit.shard)


def tear(label_set: LabelSet, unit: Manifest) -> None:
    path = Path(label_set.store.path(f"manifests/{unit.unit_key}.json"))
    path.write_bytes(path.read_bytes()[:-40])


def make_foreign(label_set: LabelSet, unit: Manifest) -> None:
    path = Path(label_set.store.path(f"manifests/{unit.unit_key}.json"))
    path.write_text(unit.model_copy(update={"fingerprint": "0" * 32}).model_dump_json())


def turn_heads_around(rows: LabelRows) -> None:
    assert rows.entry_logprobs is not None
    logprobs = rows.entry_logprobs.reshape(-1, 8)
    logprobs[:] = logprobs[:, ::-1]


def raise_the_tail(rows: LabelRows) -> None:
    assert rows.tail_logmass is not None
    rows.tail_logmass[:] = np.float16(-0.01)


def forged(change: Callable[[LabelRows], None]) -> Callable[[LabelSet, Manifest], None]:
    """Other values in good Parquet, with a manifest whose digest fits."""

    def damage(label_set: LabelSet, unit: Manifest) -> None:
        rows = read_shard(label_set.store, unit.shard, RECORD, len(unit.row_groups))
        rows = rows.take(np.arange(len(rows)))
        change(rows)
        path = Path(label_set.store.path(unit.shard))
        schema = arrow_schema(RECORD)
        owner = {FINGERPRINT_KEY: label_set.fingerprint.encode()}
        with pq.ParquetWriter(path, schema.with_metadata({**schema.metadata, **owner})) as writer:
            writer.write_table(rows.to_table(RECORD), row_group_size=len(rows))
        data = path.read_bytes()
        update = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
        manifest = Path(label_set.store.path(f"manifests/{unit.unit_key}.json"))
        manifest.write_text(unit.model_copy(update=update).model_dump_json())

    return damage


DAMAGES: list[tuple[Callable[[LabelSet, Manifest], None], str]] = [
    (flip, "row group 0, column entry_ids: damaged bytes"),
    (truncate, "bytes, the manifest records"),
    (remove, "no such shard"),
    (tear, "not a valid manifest"),
    (make_foreign, "belongs to a label set with fingerprint 000"),
    (forged(turn_heads_around), "expected a decreasing order"),
    (forged(raise_the_tail), "to sum to a probability of 1"),
]


def test_verify_names_every_damage_and_the_job_repairs_it(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"def f{n}(x):\n" + "    x = x + 1\n" * (n % 5) for n in range(40)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    job = LabelConfig.model_validate(
        {
            "labels": str(tmp_path / "labels"),
            "corpus": {"path": str(tmp_path / "corpus.jsonl"), "format": "jsonl"},
            "text": {"max_tokens": 128, "overlap": 8},
            "teacher": {"backend": "transformers", "model": str(tiny_model_dir)},
            "record": {"kind": "topk", "k": 8},
            "run": {"unit_rows": 5},
        }
    )
    first = run_label_job(job, progress=False)
    label_set = LabelSet.open(job.labels)
    units = label_set.manifests()
    assert len(units) == 8 > len(DAMAGES)
    assert main(["labels", "verify", job.labels]) == 0
    capsys.readouterr()

    for (damage, _), unit in zip(DAMAGES, units, strict=False):
        damage(label_set, unit)
    assert main(["labels", "verify", job.labels]) == 1
    shown = capsys.readouterr().out
    for (_, found), unit in zip(DAMAGES, units, strict=False):
        assert any(found in line and unit.unit_key in line for line in shown.splitlines())
    assert f"in {len(DAMAGES)} of 8 units" in shown
    for key in re.findall(r"labels drop \S+ --unit (\w+)", shown):
        assert main(["labels", "drop", job.labels, "--unit", key]) == 0

    again = run_label_job(job, progress=False)
    damaged = sum(unit.num_rows for unit in units[: len(DAMAGES)])
    assert (again.rows_labelled, again.rows_reused) == (damaged, first.rows_labelled - damaged)
    result = verify(job.labels)
    assert result.problems == []
    assert (result.rows, result.labels) == (first.rows_labelled, first.labels)
    assert main(["labels", "gc", job.labels, "--older-than", "0", "--delete"]) == 0
    assert verify(job.labels).garbage == 0
