"""What `labels show` shows: a seeded sample, heads and draws apart, tokens as readable text."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from cluster.__main__ import main
from cluster.labels.show.token_text import TokenText
from schemas.keys import unit_key
from schemas.label_set import shards
from schemas.label_set.label_set import LabelSet
from schemas.maintenance.sample import distributions, labelled_positions, sample_groups
from schemas.record import LabelRows
from schemas.spec import RecordSpec
from tests.support.label_rows import make_rows, make_spec
from tests.support.tiny_model import make_tokenizer

VOCAB = 60
SPEC = make_spec(RecordSpec(kind="topk", k=8), VOCAB)


@pytest.fixture
def label_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LabelSet:
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 3000)
    vocabulary = {f"t{id_}": id_ for id_ in range(VOCAB)}
    label_set = LabelSet.create_or_open(str(tmp_path / "labels"), SPEC, vocabulary)
    for seed in (1, 2, 3):
        rows = make_rows(20, SPEC.record, VOCAB, seed=seed)
        label_set.commit_unit(rows, [], {}, unit_key(rows.row_key))
    return label_set


def test_sample_is_a_function_of_set_and_seed(label_set: LabelSet) -> None:
    first, again, other = (
        [(group.shard, group.row_group) for group in sample_groups(label_set, 4, seed)]
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len(set(first)) == 4
    everything = sample_groups(label_set, 10_000, 0)
    assert sum(len(group.rows) for group in everything) == 60
    values = distributions(everything)
    assert len(values["entropy"]) == sum(m.num_labels for m in label_set.manifests())
    assert values["entries a label"].tolist() == [8.0] * len(values["entropy"])
    assert "of draws" not in values
    assert ((values["covered mass"] > 0) & (values["covered mass"] <= 1)).all()


def test_head_and_draws_are_told_apart() -> None:
    rows = LabelRows(
        row_key=np.zeros((2, 16), np.uint8),
        content_key=np.zeros((2, 16), np.uint8),
        token_ids=np.array([5, 6, 7, 8, 9], np.int32),
        token_offsets=np.array([0, 2, 5]),
        label_spans=np.array([1, 2, 1, 3], np.int32),
        span_offsets=np.array([0, 2, 4]),
        head_len=np.array([1, 2, 0], np.uint16),
        tail_len=np.array([1, 0, 2], np.uint16),
        entry_ids=np.array([1, 2, 3, 4, 5, 6], np.int32),
        entry_logprobs=np.array([-1, -2, -3, -4, -5, -6], np.float16),
        entry_counts=np.array([7, 8, 9], np.uint8),
        tail_logmass=np.zeros(3, np.float16),
        target_logprob=np.array([-1, -2, -3], np.float16),
        target_rank=np.array([1, 2, 3], np.int32),
    )
    (only,) = labelled_positions(rows, 0)
    assert (only.target, only.token) == (1, 6)
    assert (only.head, only.draws) == ([(1, -1.0)], [(2, -2.0, 7)])
    first, second = labelled_positions(rows, 1)
    assert (first.token, first.head, first.draws) == (8, [(3, -3.0), (4, -4.0)], [])
    assert (second.token, second.head, second.rank) == (9, [], 3)
    assert second.draws == [(5, -5.0, 8), (6, -6.0, 9)]


def test_byte_level_tokens_become_text(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = TokenText(tokenizer.get_vocab())
    sample = "def f(x):\n\treturn 'ärger' + \"→\" # ok"
    ids = tokenizer.encode(sample).ids
    assert text.text(ids) == sample
    assert text.text([tokenizer.token_to_id("<eos>"), *ids[:1]]).startswith("<eos>")
    newline = tokenizer.encode("\n").ids
    assert text.token(newline[0]) == "⏎"
    assert text.text([99999]) == "<99999>"


def test_sentence_piece_tokens_become_text() -> None:
    text = TokenText({"▁a": 0, "b": 1, "<0x0A>": 2, "<0xC3>": 3, "<0xA4>": 4, "</s>": 5})
    assert text.text([0, 1, 2, 3, 4, 5]) == " ab\nä</s>"


def test_show_prints_and_leaves_json(
    label_set: LabelSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "show.json"
    words = ["labels", "show", label_set.url, "--rows", "1", "--positions", "3"]
    assert main([*words, "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    for word in ("topk k=8", "covered mass", "the teacher's head", "no finished run", "'t"):
        assert word in shown
    facts = json.loads(out.read_text())
    assert facts["distributions"]["entries a label"]["mean"] == 8.0
    assert facts["spec"]["record"]["k"] == 8
