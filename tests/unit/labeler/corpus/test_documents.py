"""Rows as documents: which tokens are labelled, and which rows are no documents."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from labeler.config import CorpusConfig, TextConfig
from labeler.corpus.documents import RowTokenizer, text_spec
from labeler.corpus.readers import SourceRow
from labeler.corpus.windows import Document
from schemas.errors import ConfigError, RowFailure
from schemas.spec import TextSpec

VOCAB_SIZE = 320
TEXT = TextSpec(max_tokens=64, overlap=8, add_bos=True, add_eos=True, split_long=True)
PLAIN = TextSpec(max_tokens=64, overlap=8, add_bos=False, add_eos=False, split_long=True)
UNMARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello", "tool_calls": None},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "no"},
]


@pytest.fixture
def tokenizer(tiny_model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def documents(
    tokenizer: Any, values: list[Any], text: TextSpec = TEXT, prompts: bool = False, **corpus: Any
) -> list[Document | RowFailure]:
    config = CorpusConfig(path="corpus", format="jsonl", **corpus)
    rows = [
        SourceRow("a", place, value if isinstance(value, dict) else {config.text_column(): value})
        for place, value in enumerate(values)
    ]
    return RowTokenizer(tokenizer, config, text, VOCAB_SIZE, prompts).documents(rows)


def one(tokenizer: Any, value: Any, **options: Any) -> Document:
    (document,) = documents(tokenizer, [value], **options)
    assert isinstance(document, Document), document
    return document


def reason(tokenizer: Any, value: Any, **options: Any) -> str:
    (document,) = documents(tokenizer, [value], **options)
    assert isinstance(document, RowFailure), document
    assert document.detail
    return document.reason


def labelled(tokenizer: Any, document: Document) -> list[str]:
    pairs = document.spans.reshape(-1, 2)
    return [tokenizer.decode(document.token_ids[start:end]) for start, end in pairs]


def test_text_has_bos_first_and_every_other_token_labelled(tokenizer: Any) -> None:
    document = one(tokenizer, "def f():")
    assert document.token_ids.dtype == np.int32
    assert document.token_ids[0] == tokenizer.bos_token_id
    assert document.token_ids[-1] == tokenizer.eos_token_id
    assert document.spans.tolist() == [1, len(document.token_ids)]
    plain = one(tokenizer, "def f():", text=PLAIN)
    np.testing.assert_array_equal(plain.token_ids, document.token_ids[1:-1])


def test_bad_text_leaves_its_neighbours_alone(tokenizer: Any) -> None:
    values = ["fine", "", None, 7, "\ud800", "fine"]
    made = documents(tokenizer, values)
    reasons = [d.reason if isinstance(d, RowFailure) else "" for d in made]
    assert reasons == ["", "empty", "wrong_type", "wrong_type", "invalid_utf8", ""]
    rows = [
        SourceRow("a", 0, {}, RowFailure("bad_json", "detail")),
        SourceRow("a", 1, {"text": "fine"}),
    ]
    corpus = CorpusConfig(path="corpus", format="jsonl")
    first, second = RowTokenizer(tokenizer, corpus, TEXT, VOCAB_SIZE).documents(rows)
    assert first == RowFailure("bad_json", "detail")
    assert isinstance(second, Document)


def test_one_token_has_nothing_to_label(tokenizer: Any) -> None:
    assert reason(tokenizer, "x", text=PLAIN) == "nothing_to_label"
    assert one(tokenizer, "x").spans.tolist() == [1, 3]


def test_pair_labels_the_response(tokenizer: Any) -> None:
    document = one(tokenizer, {"prompt": "2+2=", "response": "4"}, kind="pair")
    assert labelled(tokenizer, document) == ["4<eos>"]
    assert tokenizer.decode(document.token_ids) == "<bos>2+2=4<eos>"
    bare = one(tokenizer, {"prompt": "", "response": "42"}, kind="pair", text=PLAIN)
    assert bare.spans.tolist() == [1, len(bare.token_ids)]
    assert reason(tokenizer, {"prompt": "x", "response": ""}, kind="pair") == "empty"
    assert reason(tokenizer, {"prompt": None, "response": "x"}, kind="pair") == "wrong_type"


@pytest.mark.parametrize("as_json", [True, False])
def test_marked_chat_labels_what_the_assistant_says(tokenizer: Any, as_json: bool) -> None:
    import json

    document = one(tokenizer, json.dumps(TALK) if as_json else TALK, kind="chat")
    assert labelled(tokenizer, document) == ["hello<eos>", "no<eos>"]


def test_unmarked_chat_gives_the_same_spans(tokenizer: Any) -> None:
    tokenizer.chat_template = UNMARKED
    document = one(tokenizer, TALK, kind="chat")
    assert labelled(tokenizer, document) == ["hello<eos>", "no<eos>"]
    assert tokenizer.decode(document.token_ids[-1:]) == "\n"


def test_chat_whose_template_rewrites_turns_is_rejected(tokenizer: Any) -> None:
    tokenizer.chat_template = UNMARKED.replace(
        "{{ m['content'] }}", "{% if loop.last %}{{ m['content'] }}{% endif %}"
    )
    assert reason(tokenizer, TALK, kind="chat") == "chat_prefix"


def test_bad_chats_have_reasons(tokenizer: Any) -> None:
    assert reason(tokenizer, "{", kind="chat") == "bad_json"
    assert reason(tokenizer, "{}", kind="chat") == "wrong_type"
    assert reason(tokenizer, ["hi"], kind="chat") == "wrong_type"
    assert reason(tokenizer, [], kind="chat") == "empty"
    assert reason(tokenizer, TALK[:1], kind="chat") == "nothing_to_label"
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert reason(tokenizer, TALK, kind="chat") == "chat_template"
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        documents(tokenizer, [TALK], kind="chat")


def test_ids_are_taken_as_they_are(tokenizer: Any) -> None:
    assert one(tokenizer, [5, 6, 7], kind="ids").spans.tolist() == [1, 3]
    assert one(tokenizer, np.array([5, 6]), kind="ids").token_ids.tolist() == [5, 6]
    assert reason(tokenizer, [5, VOCAB_SIZE], kind="ids") == "unknown_token"
    assert reason(tokenizer, [5, -1], kind="ids") == "unknown_token"
    assert reason(tokenizer, [5, 2**33], kind="ids") == "unknown_token"
    assert reason(tokenizer, [5, 2**70], kind="ids") == "wrong_type"
    assert reason(tokenizer, [5, 1.5], kind="ids") == "wrong_type"
    assert reason(tokenizer, [5, True], kind="ids") == "wrong_type"
    assert reason(tokenizer, "567", kind="ids") == "wrong_type"
    assert reason(tokenizer, [], kind="ids") == "empty"
    assert reason(tokenizer, [5], kind="ids") == "nothing_to_label"


@pytest.mark.parametrize("bad", [[0, 2], [1], [2, 2], [1, 5], [2, 3, 1, 2], [1, 3, 2, 4], None])
def test_spans_of_ids_are_checked(tokenizer: Any, bad: Any) -> None:
    options: dict[str, Any] = {"kind": "ids", "spans_column": "spans"}
    good = one(tokenizer, {"token_ids": [5, 6, 7, 8], "spans": [1, 2, 3, 4]}, **options)
    assert good.spans.tolist() == [1, 2, 3, 4]
    assert reason(tokenizer, {"token_ids": [5, 6, 7, 8], "spans": bad}, **options) == "bad_spans"


def test_prompts_have_no_eos_and_no_spans(tokenizer: Any) -> None:
    document = one(tokenizer, "def f(", prompts=True)
    assert tokenizer.decode(document.token_ids) == "<bos>def f("
    assert document.spans.size == 0
    chat = one(tokenizer, TALK[:3], kind="chat", prompts=True)
    assert tokenizer.decode(chat.token_ids).endswith("<|user|>more<|assistant|>")
    assert reason(tokenizer, TALK, kind="chat", prompts=True) == "ends_with_assistant"
    assert one(tokenizer, [5], kind="ids", prompts=True).token_ids.tolist() == [5]


def test_policy_follows_the_tokenizer_where_it_is_left_open(tokenizer: Any) -> None:
    assert text_spec(TextConfig(), tokenizer, "text").add_bos is False  # it adds none by itself
    assert text_spec(TextConfig(add_bos=True), tokenizer, "text").add_bos is True
    tokenizer.bos_token = tokenizer.eos_token = None
    assert text_spec(TextConfig(), tokenizer, "ids").add_eos is True  # of no effect there
    with pytest.raises(ConfigError, match="no BOS token"):
        text_spec(TextConfig(add_bos=True), tokenizer, "ids")
    with pytest.raises(ConfigError, match="no EOS token"):
        text_spec(TextConfig(), tokenizer, "text")
