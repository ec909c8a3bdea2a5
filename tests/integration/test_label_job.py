"""The label job on a real Ray: every row accounted for, nothing computed twice, whatever dies."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from labeler.config import LabelConfig
from labeler.run.job import run_label_job
from schemas.errors import ConfigError, CorpusError, StoreError, TeacherError
from schemas.label_set.label_set import LabelSet
from schemas.label_set.roster import read_roster
from schemas.record.reduce import reduce_rows
from schemas.record.validate import validate
from schemas.views.view import View

pytestmark = pytest.mark.usefixtures("ray_session")


def config(folder: Path, model: Path, **changes: Any) -> LabelConfig:
    values: dict[str, Any] = {
        "labels": str(folder / "labels"),
        "view": str(folder / "view"),
        "corpus": {"path": str(folder / "corpus"), "format": "jsonl", "piece_bytes": 2000},
        "text": {"max_tokens": 48, "overlap": 8, "add_bos": True},
        "teacher": {"backend": "none", "tokenizer": str(model)},
        "record": {"kind": "tokens"},
        "run": {"unit_rows": 16},
    }
    for name, change in changes.items():
        values[name] = {**values[name], **change} if name in values else change
    return LabelConfig.model_validate(values)


def write_corpus(folder: Path, rows: list[Any], name: str = "a.jsonl") -> None:
    (folder / "corpus").mkdir(exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / "corpus" / name).write_bytes(b"".join(line + b"\n" for line in lines))


def texts(count: int, start: int = 0) -> list[dict[str, str]]:
    return [
        {"text": f"def f{n}(x):\n" + "    x = x + 1\n" * (n % 9)}
        for n in range(start, start + count)
    ]


def keys_of(url: str) -> list[bytes]:
    label_set = LabelSet.open(url)
    index = label_set.index()
    assert sum(manifest.num_rows for manifest in label_set.manifests()) == len(index)
    keys: list[bytes] = index.column("row_key").to_pylist()
    assert len(set(keys)) == len(keys)
    return keys


def test_label_job_accounts_for_every_row(tmp_path: Path, tiny_model_dir: Path) -> None:
    bad = [b"{", b'{"text": "\xff"}', {"text": ""}, {"text": 3}]
    write_corpus(tmp_path, [*texts(60), *bad, *texts(20)])
    write_corpus(tmp_path, texts(10), "b.jsonl")
    first = run_label_job(config(tmp_path, tiny_model_dir), progress=False)
    assert first.rows_quarantined == 4
    assert first.reasons == {"bad_json": 1, "invalid_utf8": 1, "empty": 1, "wrong_type": 1}
    roster = read_roster(LabelSet.open(first.labels_url), first.run)
    assert len(roster) == first.rows_read
    # 30 documents stand twice; the long ones are several windows.
    windows = roster.filter([s.endswith("b.jsonl") for s in roster.column("source").to_pylist()])
    assert windows.column("disposition").to_pylist() == ["duplicate"] * len(windows)
    assert first.rows_labelled == len(keys_of(first.labels_url))
    view = View.open(first.view)
    assert view.num_rows == first.rows_labelled
    assert view.num_labels == first.labels

    again = run_label_job(config(tmp_path, tiny_model_dir), progress=False)
    assert (again.rows_labelled, again.rows_reused) == (0, first.rows_labelled)
    assert again.rows_quarantined == 4
    assert again.rows_read == first.rows_read
    assert View.open(again.view).view_hash == view.view_hash


def test_label_job_labels_only_new_rows_of_a_changed_corpus(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    write_corpus(tmp_path, texts(30))
    first = run_label_job(config(tmp_path, tiny_model_dir), progress=False)
    write_corpus(tmp_path, [*reversed(texts(30)), *texts(5, start=100)])
    second = run_label_job(config(tmp_path, tiny_model_dir), progress=False)
    assert second.rows_reused == first.rows_labelled
    assert 5 <= second.rows_labelled < first.rows_labelled
    assert len(keys_of(first.labels_url)) == first.rows_labelled + second.rows_labelled


def test_transformers_teacher_labels_what_the_assistant_says(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    talks = [
        [{"role": "user", "content": f"{n}+1?"}, {"role": "assistant", "content": str(n + 1)}]
        for n in range(40)
    ]
    write_corpus(tmp_path, [{"messages": talk, "id": n} for n, talk in enumerate(talks)])
    job = config(
        tmp_path,
        tiny_model_dir,
        corpus={"kind": "chat", "keep_columns": ["id"]},
        teacher={"backend": "transformers", "model": str(tiny_model_dir), "tokenizer": ""},
        record={"kind": "threshold", "tau": 0.05, "temperatures": [2.0]},
    )
    summary = run_label_job(job, progress=False)
    assert summary.rows_labelled == summary.rows_read == 40
    assert summary.bytes_per_label > 0
    label_set = LabelSet.open(summary.labels_url)
    rows = label_set.read_rows(label_set.index())
    assert rows.head_len is not None
    assert rows.tail_len is not None
    assert (rows.head_len >= 1).all()
    assert rows.tail_len.mean() > 5
    assert rows.num_labels == summary.labels
    assert np.isfinite(rows.entropy).all()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    said = set()
    for number in range(len(rows)):
        row = rows.slice(number, number + 1)
        start, end = row.label_spans
        said.add(tokenizer.decode(row.token_ids[start:end]))
    assert said == {f"{n + 1}<eos>" for n in range(40)}
    kept = read_roster(label_set, summary.run).column("columns").to_pylist()
    assert [json.loads(columns)["id"] for columns in kept] == list(range(40))
    assert set(label_set.vocabulary()) == set(tokenizer.get_vocab())


def test_label_job_generates_each_response_once(tmp_path: Path, tiny_model_dir: Path) -> None:
    write_corpus(tmp_path, texts(5))
    job = config(
        tmp_path,
        tiny_model_dir,
        text={"max_tokens": 100, "add_bos": True, "add_eos": False},
        teacher={"backend": "transformers", "model": str(tiny_model_dir), "tokenizer": ""},
        record={"kind": "sampled", "draws": 8},
        generate={"n": 2, "max_tokens": 6, "seed": 3},
    )
    first = run_label_job(job, progress=False)
    assert (first.rows_read, first.rows_generated, first.rows_labelled) == (10, 10, 10)
    assert 10 <= first.labels <= 60
    write_corpus(tmp_path, texts(6))
    second = run_label_job(job, progress=False)
    assert (second.rows_read, second.rows_generated, second.rows_reused) == (12, 2, 10)
    assert len(keys_of(first.labels_url)) == 12


def test_label_job_serves_a_smaller_record_from_a_richer_set(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cached rows are reused, new ones get the set's own record, the view promises the smaller."""
    write_corpus(tmp_path, texts(6))
    teacher = {"backend": "transformers", "model": str(tiny_model_dir), "tokenizer": ""}
    rich = {"kind": "threshold", "tau": 0.03, "temperatures": [2.0]}
    job = config(tmp_path, tiny_model_dir, teacher=teacher, record=rich)
    first = run_label_job(job, progress=False)
    assert first.reduced == ""
    write_corpus(tmp_path, texts(8))
    less = {"kind": "threshold", "tau": 0.2, "temperatures": [2.0], "entropy": False}
    job = config(tmp_path, tiny_model_dir, teacher=teacher, record=less)
    second = run_label_job(job)
    assert second.rows_reused == first.rows_labelled
    assert second.rows_labelled > 0
    assert second.fingerprint == first.fingerprint
    assert "stored tau 0.03, requested 0.2" in second.reduced
    assert "reusing richer labels (stored entropy True, requested False" in capsys.readouterr().err
    view = View.open(second.view)
    assert view.records == [job.record]
    label_set = view.label_sets[0]
    assert label_set.spec.record.tau == 0.03
    rows = label_set.read_rows(view.table)
    reduced = reduce_rows(rows, label_set.spec.record, job.record)
    validate(reduced, job.record, label_set.spec.teacher.vocab_size)
    assert len(reduced.entry_ids) < len(rows.entry_ids)
    more = config(tmp_path, tiny_model_dir, teacher=teacher, record={**rich, "tau": 0.01})
    with pytest.raises(StoreError, match=r"record\.tau: 0\.03 is stored"):
        run_label_job(more, progress=False)


def test_task_error_reaches_the_user_as_one_line(tmp_path: Path, tiny_model_dir: Path) -> None:
    write_corpus(tmp_path, texts(3))
    teacher = {"backend": "transformers", "model": str(tiny_model_dir), "tokenizer": ""}
    broken = {**teacher, "engine": {"no_such_option": 1}}
    job = config(tmp_path, tiny_model_dir, teacher=broken, record={"kind": "topk", "k": 8})
    with pytest.raises(TeacherError, match="no_such_option") as caught:
        run_label_job(job, progress=False)
    assert type(caught.value) is TeacherError
    assert "\n" not in str(caught.value)


def test_label_job_refuses_mistakes_before_labelling(tmp_path: Path, tiny_model_dir: Path) -> None:
    write_corpus(tmp_path, texts(3))
    with pytest.raises(CorpusError, match="has no column"):
        run_label_job(config(tmp_path, tiny_model_dir, corpus={"column": "body"}))
    teacher = {"backend": "transformers", "model": str(tiny_model_dir), "tokenizer": ""}
    record = {"kind": "topk", "k": 8}
    text = {"max_tokens": 512}
    job = config(tmp_path, tiny_model_dir, teacher=teacher, record=record, text=text)
    with pytest.raises(ConfigError, match="labels at most 511 tokens"):
        run_label_job(job)
    assert not (tmp_path / "labels").exists()
