"""Sampled responses as chats: decoded by the teacher's tokenizer, in two formats, read back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from cluster.__main__ import main
from schemas.keys import content_key, generated_row_key, stack_keys, unit_key
from schemas.label_set.label_set import LabelSet
from schemas.label_set.roster import close_roster, write_part
from schemas.record import LabelRows
from schemas.record.spans import offsets_of
from schemas.spec import GenerationSpec, LabelSetSpec, RecordSpec, TeacherIdentity, TextSpec
from tests.support.tiny_model import CHAT_TEMPLATE, make_tokenizer

PROMPTS = ["def f(x):\n", "say Ärger → ok"]
RESPONSES = ["    return x\n", "\"fine\" 'ok'", "no\n\n", ""]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    make_tokenizer(tmp_path / "teacher")
    return AutoTokenizer.from_pretrained(tmp_path / "teacher")


def make_set(
    tmp_path: Path, tokenizer: Any, prompts: list[list[int]], columns: list[str]
) -> LabelSet:
    generation = GenerationSpec(n=2, max_tokens=32)
    spec = LabelSetSpec(
        record=RecordSpec(kind="tokens"),
        teacher=TeacherIdentity(tokenizer_digest="t", vocab_size=len(tokenizer)),
        text=TextSpec(max_tokens=512, overlap=64, add_bos=True, add_eos=False, split_long=True),
        generation=generation,
    )
    label_set = LabelSet.create_or_open(str(tmp_path / "labels"), spec, tokenizer.get_vocab())
    ids, spans, keys = [], [], []
    for number, response in enumerate(RESPONSES):
        prompt = np.array(prompts[number // 2], np.int32)
        said = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids.append(np.concatenate([prompt, np.array(said, np.int32)]))
        spans.append(np.array([len(prompt), len(ids[-1])], np.int32))
        keys.append(generated_row_key(prompt, generation, number % 2))
    rows = LabelRows(
        row_key=stack_keys(keys),
        content_key=stack_keys([content_key(*pair) for pair in zip(ids, spans, strict=True)]),
        token_ids=np.concatenate(ids),
        token_offsets=offsets_of(np.array([len(row) for row in ids])),
        label_spans=np.concatenate(spans),
        span_offsets=offsets_of(np.full(len(spans), 2)),
    )
    model = {"model": str(tmp_path / "teacher")}
    label_set.commit_unit(rows, [], model, unit_key(rows.row_key))
    part = {
        "row_key": keys,
        "source": ["p.jsonl"] * 4,
        "place": pa.array([0, 0, 9, 9], pa.int64()),
        "window": pa.array([0] * 4, pa.int32()),
        "sample": pa.array([0, 1, 0, 1], pa.int32()),
        "columns": columns,
    }
    write_part(label_set.store, "r1", pa.table(part))
    close_roster(label_set, "r1")
    return label_set


def texts(tokenizer: Any) -> list[list[int]]:
    bos = [tokenizer.bos_token_id]
    return [bos + tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]


def test_text_prompts_both_formats(tmp_path: Path, tokenizer: Any) -> None:
    label_set = make_set(tmp_path, tokenizer, texts(tokenizer), [""] * 4)
    words = ["labels", "export", label_set.url]
    assert main([*words, f"{tmp_path}/out/c.jsonl", "--format", "chat-jsonl"]) == 0
    lines = (tmp_path / "out" / "c.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    assert [row["messages"] for row in found] == [
        [
            {"role": "user", "content": PROMPTS[n // 2]},
            {"role": "assistant", "content": response},
        ]
        for n, response in enumerate(RESPONSES)
    ]
    assert [(row["place"], row["sample"]) for row in found] == [(0, 0), (0, 1), (9, 0), (9, 1)]
    assert main([*words, f"{tmp_path}/c.parquet", "--format", "chat-parquet"]) == 0
    assert pq.read_table(tmp_path / "c.parquet").to_pylist() == found


def test_chat_prompts_need_their_messages(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    talks = [
        [{"role": "system", "content": "be kind"}, {"role": "user", "content": p}] for p in PROMPTS
    ]
    prompts = [
        tokenizer.apply_chat_template(
            talk, chat_template=CHAT_TEMPLATE, add_generation_prompt=True, return_dict=False
        )
        for talk in talks
    ]
    kept = [json.dumps({"messages": talks[n // 2]}) for n in range(4)]
    label_set = make_set(tmp_path, tokenizer, prompts, kept)
    words = ["labels", "export", label_set.url, f"{tmp_path}/c.jsonl", "--format", "chat-jsonl"]
    assert main(words) == 0
    first = json.loads((tmp_path / "c.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["messages"] == [*talks[0], {"role": "assistant", "content": RESPONSES[0]}]

    (tmp_path / "other").mkdir()
    without = make_set(tmp_path / "other", tokenizer, prompts, [""] * 4)
    words = ["labels", "export", without.url, f"{tmp_path}/d.jsonl", "--format", "chat-jsonl"]
    assert main([*words, "--tokenizer", str(tmp_path / "teacher")]) == 1
    assert 'corpus.keep_columns = ["messages"]' in capsys.readouterr().err
    assert not (tmp_path / "d.jsonl").exists()


def test_export_refuses_another_tokenizer(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    label_set = make_set(tmp_path, tokenizer, texts(tokenizer), [""] * 4)
    make_tokenizer(tmp_path / "wrong", vocab_size=300)
    words = ["labels", "export", label_set.url, f"{tmp_path}/c.jsonl", "--format", "chat-jsonl"]
    assert main([*words, "--tokenizer", str(tmp_path / "wrong")]) == 1
    assert "tokens differ" in capsys.readouterr().err
    assert main([*words, "--tokenizer", str(tmp_path / "nowhere")]) == 1
    assert "no tokenizer can be loaded" in capsys.readouterr().err
