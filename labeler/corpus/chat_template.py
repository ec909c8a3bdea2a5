"""Renders conversations with the chat template and finds the assistant's tokens.

If the template marks them with ``{% generation %}``, its own mask is used. Otherwise each assistant
turn is located by rendering the conversation up to its start and up to its end: the first rendering
must be a prefix of the second and the second of the full conversation, token by token, or the row
is rejected. (Templates that rewrite earlier turns, for example by dropping their reasoning, fail
this check: the student would be trained on misplaced tokens.) White space that a template puts
after the end of a turn does not belong to the assistant.
"""

import re
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np

from labeler.corpus.windows import Document
from schemas.errors import ConfigError, RowFailure

# Errors that a template may raise on the content of a message.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError, ValueError, TypeError, KeyError, AttributeError, IndexError,
)  # fmt: skip


class ChatTokenizer:
    """Tokenises conversations with the template of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """Reads the tokenizer's template.

        Raises:
            ConfigError: The tokenizer has no chat template.
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
        self._has_mask = re.search(r"\{%-?\s*generation\b", template) is not None
        self._special_ids = frozenset(tokenizer.all_special_ids)

    def document(self, messages: Any, as_prompt: bool) -> Document | RowFailure:
        """Tokenises a conversation.

        Args:
            messages: the value of the row, of any type.
            as_prompt: render a prompt that ends with the opening of an assistant turn and has no
                spans. Otherwise the spans are the assistant's tokens.
        """
        failure = _check_shape(messages)
        if failure is None and as_prompt and messages[-1]["role"] == "assistant":
            failure = RowFailure(
                "ends_with_assistant", "the last turn is the assistant's; nothing to generate"
            )
        if failure is not None:
            return failure
        # Parquet fills in null for fields that exist only in other messages.
        messages = [{k: v for k, v in turn.items() if v is not None} for turn in messages]
        try:
            if as_prompt:
                ids = self._render(messages, open_turn=True)
                return Document(np.array(ids, np.int32), np.empty(0, np.int32))
            return self._by_mask(messages) if self._has_mask else self._by_prefixes(messages)
        except _TEMPLATE_ERRORS as error:
            return RowFailure("chat_template", f"{type(error).__name__}: {error}")

    def _by_mask(self, messages: list[dict[str, Any]]) -> Document:
        rendered = self._tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = np.array(rendered["input_ids"], np.int32)
        mask = np.array(rendered["assistant_masks"], np.int8)
        mask[:1] = 0  # the first token has no context
        edges = np.flatnonzero(np.diff(mask, prepend=0, append=0))
        return Document(ids, edges.astype(np.int32))

    def _by_prefixes(self, messages: list[dict[str, Any]]) -> Document | RowFailure:
        ids = self._render(messages)
        spans: list[int] = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:turn], open_turn=True)
            after = self._render(messages[: turn + 1])
            if after[: len(before)] != before or ids[: len(after)] != after:
                return RowFailure("chat_prefix", f"later turns change how turn {turn} is rendered")
            start, end = max(len(before), 1), self._turn_end(ids, len(before), len(after))
            if spans and spans[-1] == start:  # adjacent turns form one span
                spans[-1] = end
            elif start < end:
                spans += [start, end]
        return Document(np.array(ids, np.int32), np.array(spans, np.int32))

    def _turn_end(self, ids: list[int], start: int, end: int) -> int:
        """Returns the end of a turn, excluding white space after its last special token."""
        last = end
        while last > start and ids[last - 1] not in self._special_ids:
            last -= 1
        if last > start and not self._tokenizer.decode(ids[last:end]).strip():
            return last
        return end

    def _render(self, messages: Sequence[dict[str, Any]], open_turn: bool = False) -> list[int]:
        ids: list[int] = self._tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, add_generation_prompt=open_turn
        )["input_ids"]
        return ids


def _check_shape(messages: Any) -> RowFailure | None:
    if not isinstance(messages, list):
        found = type(messages).__name__
        return RowFailure("wrong_type", f"expected a list of messages, found {found}")
    if not messages:
        return RowFailure("empty", "the list of messages is empty")
    for turn, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return RowFailure("wrong_type", f"message {turn} is not an object with a role")
    return None
