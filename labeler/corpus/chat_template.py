"""Conversations: the tokenizer's chat template, and which tokens the assistant said.

Where the template marks them with ``{% generation %}``, its own mask is used. Otherwise each
assistant turn is found by rendering the conversation up to it and up to its end: the first must be
a prefix of the second, and the second of the whole, token by token, or the row is rejected.
(Templates that rewrite earlier turns, by dropping their reasoning for example, fail this check: the
student would be trained on tokens that stand elsewhere.) White space that a template puts after the
end of a turn is not the assistant's.
"""

import re
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np

from labeler.corpus.windows import Int32Array
from schemas.errors import ConfigError, RowFailure

# A template may fail on the content of a message in any of these ways.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError, ValueError, TypeError, KeyError, AttributeError, IndexError,
)  # fmt: skip

Chat = tuple[Int32Array, Int32Array] | RowFailure
"""Token ids int32 [L] and flat spans, or why the conversation cannot be used."""


class ChatTokenizer:
    """Turns lists of messages into token ids and spans."""

    def __init__(self, tokenizer: Any) -> None:
        """Looks at the tokenizer's template.

        Raises:
            ConfigError: There is none.
        """
        template = tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if not template:
            raise ConfigError(
                'corpus.kind is "chat", but the tokenizer has no chat template; use a tokenizer '
                'that has one (teacher.tokenizer) or corpus.kind = "pair"'
            )
        self._tokenizer = tokenizer
        self._marked = re.search(r"\{%-?\s*generation\b", template) is not None
        self._special = frozenset(tokenizer.all_special_ids)

    def conversation(self, messages: Any) -> Chat:
        """Token ids of a whole conversation, and the spans of what the assistant said in it."""
        problem = _shape_problem(messages)
        if problem is not None:
            return problem
        messages = _without_nulls(messages)
        try:
            if self._marked:
                return self._by_mask(messages)
            return self._by_prefixes(messages)
        except _TEMPLATE_ERRORS as error:
            return RowFailure("chat_template", f"{type(error).__name__}: {error}")

    def prompt(self, messages: Any) -> Chat:
        """Token ids of a conversation that the assistant is to continue."""
        problem = _shape_problem(messages)
        if problem is None and messages[-1]["role"] == "assistant":
            detail = "there is no turn to generate after the assistant's"
            problem = RowFailure("ends_with_assistant", detail)
        if problem is not None:
            return problem
        try:
            ids = self._render(_without_nulls(messages), open_turn=True)
        except _TEMPLATE_ERRORS as error:
            return RowFailure("chat_template", f"{type(error).__name__}: {error}")
        return np.array(ids, np.int32), np.empty(0, np.int32)

    def _by_mask(self, messages: list[dict[str, Any]]) -> Chat:
        rendered = self._tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = np.array(rendered["input_ids"], np.int32)
        mask = np.array(rendered["assistant_masks"], np.int8)
        mask[:1] = 0  # nothing stands before the first token
        edges = np.flatnonzero(np.diff(mask, prepend=0, append=0))
        return ids, edges.astype(np.int32)

    def _by_prefixes(self, messages: list[dict[str, Any]]) -> Chat:
        whole = self._render(messages)
        spans: list[int] = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:turn], open_turn=True)
            after = self._render(messages[: turn + 1])
            if not _is_prefix(before, after) or not _is_prefix(after, whole):
                detail = f"turn {turn} is rendered differently once the conversation goes on"
                return RowFailure("chat_prefix", detail)
            start, end = max(len(before), 1), self._turn_end(whole, len(before), len(after))
            if spans and spans[-1] == start:
                spans[-1] = end
            elif start < end:
                spans += [start, end]
        return np.array(whole, np.int32), np.array(spans, np.int32)

    def _turn_end(self, ids: list[int], start: int, end: int) -> int:
        """The end of a turn without the white space that follows its last special token."""
        last = end
        while last > start and ids[last - 1] not in self._special:
            last -= 1
        if last > start and not self._tokenizer.decode(ids[last:end]).strip():
            return last
        return end

    def _render(self, messages: Sequence[dict[str, Any]], open_turn: bool = False) -> list[int]:
        ids: list[int] = self._tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, add_generation_prompt=open_turn
        )["input_ids"]
        return ids


def _shape_problem(messages: Any) -> RowFailure | None:
    if not isinstance(messages, list):
        found = type(messages).__name__
        return RowFailure("wrong_type", f"expected a list of messages, found {found}")
    if not messages:
        return RowFailure("empty", "there are no messages")
    for turn, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return RowFailure("wrong_type", f"message {turn} is no object with a role")
    return None


def _without_nulls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages without null fields: Parquet fills in the fields that other messages have."""
    return [
        {name: value for name, value in message.items() if value is not None}
        for message in messages
    ]


def _is_prefix(prefix: list[int], ids: list[int]) -> bool:
    return ids[: len(prefix)] == prefix
