"""Labels in other trainers' layouts, read back by decoders that follow their descriptions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from cluster.__main__ import main
from cluster.labels.export.layouts import (
    IGNORED,
    axolotl_table,
    check_exportable,
    distillkit_table,
    index_bits,
    pack_ids,
)
from schemas.errors import RecordError
from schemas.keys import unit_key
from schemas.label_set.label_set import LabelSet
from schemas.maintenance.sample import labelled_positions
from schemas.record import LabelRows
from schemas.spec import RecordSpec
from tests.support.label_rows import make_rows, make_spec

VOCAB = 60
K = 8
SPEC = make_spec(RecordSpec(kind="topk", k=K), VOCAB)


@pytest.fixture
def rows() -> LabelRows:
    return make_rows(12, SPEC.record, VOCAB, seed=4)


def by_row(rows: LabelRows, number: int) -> dict[int, list[tuple[int, float]]]:
    """Target index -> head."""
    return {label.target: label.head for label in labelled_positions(rows, number)}


def tokens_of(rows: LabelRows, number: int) -> list[int]:
    found: list[int] = rows.token_ids[
        rows.token_offsets[number] : rows.token_offsets[number + 1]
    ].tolist()
    return found


def test_axolotl_row_j_is_over_token_j_plus_1(rows: LabelRows) -> None:
    table = axolotl_table(rows)
    assert len(table) == len(rows)
    for number, found in enumerate(table.to_pylist()):
        tokens, expected = tokens_of(rows, number), by_row(rows, number)
        assert found["input_ids"] == tokens
        assert found["attention_mask"] == [1] * len(tokens)
        assert found["labels"] == [t if i in expected else IGNORED for i, t in enumerate(tokens)]
        for name in ("target_token_ids", "target_logprobs", "target_mask"):
            assert len(found[name]) == len(tokens)
        for j in range(len(tokens)):
            mask = found["target_mask"][j]
            assert len(mask) == K
            if j + 1 not in expected:
                assert mask == [0] * K
                continue
            assert mask == [1] * K
            pairs = zip(found["target_token_ids"][j], found["target_logprobs"][j], strict=True)
            assert list(pairs) == expected[j + 1]
            # What axolotl's README states of its own mask.
            assert found["labels"][j + 1] != IGNORED
        assert found["target_mask"][-1] == [0] * K


def test_axolotl_takes_heads_of_any_length() -> None:
    rows = LabelRows(
        row_key=np.zeros((1, 16), np.uint8),
        content_key=np.zeros((1, 16), np.uint8),
        token_ids=np.array([5, 6, 7, 8], np.int32),
        token_offsets=np.array([0, 4]),
        label_spans=np.array([2, 4], np.int32),
        span_offsets=np.array([0, 2]),
        head_len=np.array([1, 3], np.uint16),
        tail_len=np.zeros(2, np.uint16),
        entry_ids=np.array([1, 2, 3, 4], np.int32),
        entry_logprobs=np.array([-0.5, -1, -2, -3], np.float16),
    )
    (found,) = axolotl_table(rows).to_pylist()
    assert found["target_token_ids"] == [[0], [1], [2, 3, 4], [0]]
    assert found["target_logprobs"][1:3] == [[-0.5], [-1.0, -2.0, -3.0]]
    assert found["target_mask"] == [[0], [1], [1, 1, 1], [0]]
    assert found["labels"] == [-100, -100, 7, 8]


def unpacked(data: list[int], bits: int, count: int) -> list[int]:
    text = "".join(f"{byte:08b}" for byte in data)
    return [int(text[n * bits : (n + 1) * bits], 2) for n in range(count)]


def test_distillkit_row_j_is_over_token_j_plus_1(rows: LabelRows) -> None:
    table = distillkit_table(rows, VOCAB)
    assert len(table) == len(rows)
    for number, found in enumerate(table.to_pylist()):
        tokens, expected = tokens_of(rows, number), by_row(rows, number)
        assert found["input_ids"] == tokens[:-1]
        assert len(found["compressed_logprobs"]) == len(tokens) - 1
        for j in range(len(tokens) - 1):
            logprobs = np.frombuffer(bytes(found["compressed_logprobs"][j]), "<f2")
            ids = unpacked(found["bytepacked_indices"][j], 6, K)
            assert len(found["bytepacked_indices"][j]) == -(-K * 6 // 8)
            assert np.isfinite(logprobs).all()
            if j + 1 in expected:
                assert list(zip(ids, logprobs.tolist(), strict=True)) == expected[j + 1]
                assert found["labels"][j] == tokens[j]
            else:
                assert found["labels"][j] == IGNORED


def test_single_tokens_are_left_out_by_distillkit() -> None:
    rows = make_rows(3, RecordSpec(kind="topk", k=K), VOCAB, min_tokens=1, max_tokens=1)
    assert len(distillkit_table(rows, VOCAB)) == 0


@pytest.mark.parametrize(("vocab", "bits"), [(2, 1), (60, 6), (64, 6), (65, 7), (151936, 18)])
def test_widths_of_packed_ids(vocab: int, bits: int) -> None:
    assert index_bits(vocab) == bits
    ids = np.random.default_rng(0).integers(0, vocab, (5, 7))
    packed = pack_ids(ids, bits)
    assert packed.shape == (5, -(-7 * bits // 8))
    assert [unpacked(row.tolist(), bits, 7) for row in packed] == ids.tolist()


@pytest.mark.parametrize("layout", ["axolotl", "distillkit"])
def test_layouts_refuse_what_they_cannot_express(layout: str) -> None:
    for record, found in (
        (RecordSpec(kind="threshold"), "draws carry weights"),
        (RecordSpec(kind="sampled"), "draws carry weights"),
        (RecordSpec(kind="tokens"), "no teacher labels"),
        (RecordSpec(kind="topk", teacher_context=True), "only the teacher saw"),
    ):
        with pytest.raises(RecordError, match=found):
            check_exportable(make_spec(record, VOCAB), layout)
    topp = make_spec(RecordSpec(kind="topp"), VOCAB)
    if layout == "axolotl":
        check_exportable(topp, layout)
    else:
        with pytest.raises(RecordError, match="differ in length"):
            check_exportable(topp, layout)


def make_set(tmp_path: Path) -> tuple[LabelSet, LabelRows]:
    label_set = LabelSet.create_or_open(str(tmp_path / "labels"), SPEC)
    parts = [make_rows(6, SPEC.record, VOCAB, seed=seed) for seed in (1, 2)]
    parts.append(parts[0].slice(0, 2))  # another unit has some rows again
    for part in parts:
        label_set.commit_unit(part, [], {}, unit_key(part.row_key))
    return label_set, LabelRows.concat(parts[:2])


def read_back(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("data_*"))])


def test_files_hold_each_row_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    label_set, rows = make_set(tmp_path)
    out = tmp_path / "axolotl"
    assert main(["labels", "export", label_set.url, str(out), "--format", "axolotl"]) == 0
    keys = read_back(out).column("row_key").to_pylist()
    assert sorted(keys) == sorted(key.tobytes().hex() for key in rows.row_key)
    assert "12 rows as axolotl" in capsys.readouterr().out
    # axolotl takes a data set for tokenised by these three columns.
    found: Any = load_dataset("parquet", data_files=str(out / "data_*.parquet"), split="train")
    assert {"input_ids", "attention_mask", "labels"} <= set(found.features)
    assert not list(out.glob("*.partial"))
    assert "kd_normalize_topk: false" in (out / "axolotl.yaml").read_text()

    out = tmp_path / "distillkit"
    assert main(["labels", "export", label_set.url, str(out), "--format", "distillkit"]) == 0
    table = read_back(out)
    assert len(table) == 12
    assert "labels" in table.column_names
    assert "cross_entropy the weight 0" in (out / "distillkit.yaml").read_text()
    config = (out / "compression_config.yaml").read_text().splitlines()
    assert {"k: 8", "exact_k: 8", "exact_dtype: float16", "d: 60"} <= set(config)
    assert table.schema.field("input_ids").type == pa.list_(pa.uint64())


def test_wholly_labelled_sets_need_no_mask(tmp_path: Path) -> None:
    label_set = LabelSet.create_or_open(str(tmp_path / "labels"), SPEC)
    rows = make_rows(3, SPEC.record, VOCAB, min_tokens=3, max_tokens=4)
    label_set.commit_unit(rows, [], {}, unit_key(rows.row_key))
    out = tmp_path / "out"
    assert main(["labels", "export", label_set.url, str(out), "--format", "distillkit"]) == 0
    assert "labels" not in read_back(out).column_names


def test_refusals_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    label_set, _ = make_set(tmp_path)
    words = ["labels", "export", label_set.url, str(tmp_path / "x"), "--format"]
    assert main([*words, "chat-jsonl"]) == 1
    assert "no sampled responses" in capsys.readouterr().err
    assert json.loads((tmp_path / "labels" / "label_set.json").read_text())["fingerprint"]
