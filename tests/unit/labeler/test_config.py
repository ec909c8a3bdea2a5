"""What a label.toml may say, and what it may not."""

from typing import Any

import pydantic
import pytest

from labeler.config import LabelConfig
from schemas.spec import RecordSpec


def config(**changes: Any) -> LabelConfig:
    values: dict[str, Any] = {
        "labels": "labels",
        "corpus": {"path": "corpus"},
        "teacher": {"model": "model"},
    }
    return LabelConfig.model_validate({**values, **changes})


def test_engine_gets_the_context_that_the_text_needs() -> None:
    assert config(text={"max_tokens": 300}).teacher_with_context().max_model_len == 301
    fixed = config(teacher={"model": "m", "max_model_len": 2048}, text={"max_tokens": 300})
    assert fixed.teacher_with_context().max_model_len == 2048


def test_columns_by_kind() -> None:
    kinds = {"text": "text", "chat": "messages", "ids": "token_ids"}
    for kind, column in kinds.items():
        assert config(corpus={"path": "c", "kind": kind}).corpus.text_column() == column
    assert config(corpus={"path": "c", "column": "body"}).corpus.text_column() == "body"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {}}, r"teacher\.model is needed"),
        ({"teacher": {"backend": "none"}, "record": {"kind": "tokens"}}, r"teacher\.tokenizer is"),
        (
            {"teacher": {"backend": "none", "tokenizer": "t"}},
            'kind "tokens" and backend "none"',
        ),
        ({"record": {"kind": "tokens"}}, 'kind "tokens" and backend "none"'),
        ({"text": {"max_tokens": 64, "overlap": 63}}, "leaves no room for new tokens"),
        (
            {"teacher": {"model": "m", "max_model_len": 512}, "text": {"max_tokens": 512}},
            "labels at most 511",
        ),
        (
            {"record": {"teacher_context": True}},
            r"record\.teacher_context is true, but a label job",
        ),
        ({"generate": {"max_tokens": 1024}}, "leaves no room for a prompt"),
        ({"generate": {}, "corpus": {"path": "c", "kind": "pair"}}, "needs prompts"),
        ({"corpus": {"path": "c", "format": "text", "kind": "chat"}}, 'only have kind "text"'),
        ({"corpus": {"path": "c", "format": "text", "keep_columns": ["a"]}}, "no columns to keep"),
        ({"corpus": {"path": "c", "spans_column": "s"}}, "spans_column is only read"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        config(**changes)


def test_labels_are_of_the_default_kind_where_nothing_is_said() -> None:
    config = LabelConfig.model_validate(
        {"labels": "x", "corpus": {"path": "y"}, "teacher": {"model": "z"}}
    )
    assert config.record == RecordSpec()
    assert config.record.kind == "threshold"
