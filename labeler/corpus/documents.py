"""From rows of the corpus to documents: token ids, and the spans of them to be labelled.

=====  =======================================  =============================================
kind   a row                                    what is labelled
=====  =======================================  =============================================
text   a string                                 every token but the first
chat   messages (or a JSON string of them)      what the assistant says
pair   a prompt and a response                  the response
ids    ready token ids, optionally with spans   the spans, else every token but the first
=====  =======================================  =============================================

Where responses are to be generated, a row is a prompt and has no spans yet: the text without EOS,
the messages with the template's opening of an assistant turn, or the ready ids.

A row that is no document becomes a ``RowFailure`` and does not disturb the others.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from labeler.config import CorpusConfig, TextConfig
from labeler.corpus.chat_template import ChatTokenizer
from labeler.corpus.readers import SourceRow
from labeler.corpus.windows import Int32Array, all_but_first
from schemas.errors import ConfigError, RowFailure
from schemas.record.spans import span_problem, unknown_token_problem
from schemas.spec import TextSpec


@dataclass(frozen=True)
class Document:
    """One document before it is cut into windows.

    Attributes:
        token_ids: int32 [L].
        spans: int32 [2 * spans], flat half-open [start, end) pairs of target indices, start >= 1;
            empty for a prompt.
    """

    token_ids: Int32Array
    spans: Int32Array


def text_spec(text: TextConfig, tokenizer: Any, kind: str) -> TextSpec:
    """The policy of a run, with ``add_bos`` decided where the configuration leaves it to the
    tokenizer.

    Raises:
        ConfigError: A token is asked for that the tokenizer does not have.
    """
    add_bos = text.add_bos
    if add_bos is None:
        ids = tokenizer("a")["input_ids"]
        add_bos = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    elif add_bos and tokenizer.bos_token_id is None:
        raise ConfigError(
            "text.add_bos is true, but the tokenizer has no BOS token; set it to false"
        )
    if kind in ("text", "pair") and text.add_eos and tokenizer.eos_token_id is None:
        raise ConfigError(
            "text.add_eos is true, but the tokenizer has no EOS token; set it to false"
        )
    return TextSpec(
        max_tokens=text.max_tokens,
        overlap=text.overlap,
        add_bos=add_bos,
        add_eos=text.add_eos,
        split_long=text.split_long,
    )


class RowTokenizer:
    """Turns rows into documents."""

    def __init__(
        self,
        tokenizer: Any,
        corpus: CorpusConfig,
        text: TextSpec,
        vocab_size: int,
        prompts: bool = False,
    ) -> None:
        """Prepares for the rows of one corpus.

        Args:
            tokenizer: A transformers tokenizer.
            corpus: Says the kind and the columns.
            text: The BOS and EOS policy.
            vocab_size: Ids are in [0, vocab_size).
            prompts: Rows are prompts to generate from.

        Raises:
            ConfigError: The corpus is of chats, but the tokenizer has no chat template.
        """
        self._tokenizer = tokenizer
        self._corpus = corpus
        self._vocab_size = vocab_size
        self._prompts = prompts
        self._bos = [tokenizer.bos_token_id] if text.add_bos else []
        self._eos = [tokenizer.eos_token_id] if text.add_eos and not prompts else []
        self._chat = ChatTokenizer(tokenizer) if corpus.kind == "chat" else None

    def documents(self, rows: Sequence[SourceRow]) -> list[Document | RowFailure]:
        """One document, or the reason why not, for each row."""
        make: dict[str, Callable[[list[SourceRow]], list[Document | RowFailure]]] = {
            "text": self._texts,
            "pair": self._pairs,
            "chat": self._chats,
            "ids": self._ids,
        }
        good = [row for row in rows if row.failure is None]
        made = iter(make[self._corpus.kind](good))
        return [row.failure or self._checked(next(made)) for row in rows]

    def _checked(self, document: Document | RowFailure) -> Document | RowFailure:
        """The document, or why the teacher cannot be asked about it."""
        if isinstance(document, RowFailure):
            return document
        ids = document.token_ids
        problem = unknown_token_problem(ids, self._vocab_size)
        if problem:
            return RowFailure("unknown_token", problem)
        if ids.size == 0 or (document.spans.size == 0 and not self._prompts):
            return RowFailure(
                "nothing_to_label", f"{ids.size} tokens, none of which is to be labelled"
            )
        return document

    def _texts(self, rows: list[SourceRow]) -> list[Document | RowFailure]:
        encoded = self._encode([row.values[self._corpus.text_column()] for row in rows])
        return [
            ids if isinstance(ids, RowFailure) else self._document([*self._bos, *ids, *self._eos])
            for ids in encoded
        ]

    def _document(self, ids: list[int]) -> Document:
        spans = np.empty(0, np.int32) if self._prompts else all_but_first(len(ids))
        return Document(np.array(ids, np.int32), spans)

    def _pairs(self, rows: list[SourceRow]) -> list[Document | RowFailure]:
        corpus = self._corpus
        prompts = self._encode([row.values[corpus.prompt_column] for row in rows], empty=True)
        responses = self._encode([row.values[corpus.response_column] for row in rows])
        documents: list[Document | RowFailure] = []
        for prompt, response in zip(prompts, responses, strict=True):
            if isinstance(prompt, RowFailure):
                documents.append(RowFailure(prompt.reason, f"prompt: {prompt.detail}"))
            elif isinstance(response, RowFailure):
                documents.append(RowFailure(response.reason, f"response: {response.detail}"))
            else:
                before = [*self._bos, *prompt]
                ids = np.array([*before, *response, *self._eos], np.int32)
                spans = [max(len(before), 1), len(ids)]
                documents.append(Document(ids, np.array(spans if len(ids) > 1 else [], np.int32)))
        return documents

    def _encode(self, texts: list[Any], empty: bool = False) -> list[list[int] | RowFailure]:
        """Token ids of each text, nothing added around them."""
        problems = [_text_problem(text, empty) for text in texts]
        good = [text for text, problem in zip(texts, problems, strict=True) if problem is None]
        if good:
            encoded = iter(
                self._tokenizer(
                    good, add_special_tokens=False, return_attention_mask=False, verbose=False
                )["input_ids"]
            )
        return [next(encoded) if problem is None else problem for problem in problems]

    def _chats(self, rows: list[SourceRow]) -> list[Document | RowFailure]:
        assert self._chat is not None
        documents: list[Document | RowFailure] = []
        for row in rows:
            messages = row.values[self._corpus.text_column()]
            if isinstance(messages, str):
                try:
                    messages = json.loads(messages)
                except (ValueError, RecursionError) as error:
                    documents.append(RowFailure("bad_json", str(error)))
                    continue
            if self._prompts:
                chat = self._chat.prompt(messages)
            else:
                chat = self._chat.conversation(messages)
            documents.append(chat if isinstance(chat, RowFailure) else Document(*chat))
        return documents

    def _ids(self, rows: list[SourceRow]) -> list[Document | RowFailure]:
        return [self._ready(row) for row in rows]

    def _ready(self, row: SourceRow) -> Document | RowFailure:
        ids = _integers(row.values[self._corpus.text_column()])
        if ids is None:
            return RowFailure("wrong_type", "token ids are no list of integers")
        if ids.size == 0:
            return RowFailure("empty", "no token ids")
        problem = unknown_token_problem(ids, self._vocab_size)  # before narrowing to 32 bits
        if problem:
            return RowFailure("unknown_token", problem)
        token_ids = ids.astype(np.int32)
        if self._prompts:
            return Document(token_ids, np.empty(0, np.int32))
        if not self._corpus.spans_column:
            return Document(token_ids, all_but_first(len(token_ids)))
        spans = _integers(row.values[self._corpus.spans_column])
        if spans is None:
            found = row.values[self._corpus.spans_column]
            return RowFailure("bad_spans", f"spans are {found}; expected a list of integers")
        problem = span_problem(spans, len(token_ids))
        if problem:
            return RowFailure("bad_spans", problem)
        return Document(token_ids, spans.astype(np.int32))


def _text_problem(text: Any, empty: bool) -> RowFailure | None:
    if not isinstance(text, str):
        return RowFailure("wrong_type", f"expected a string, found {type(text).__name__}")
    if not text and not empty:
        return RowFailure("empty", "the text is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, from a JSON escape
        return RowFailure("invalid_utf8", f"character {error.start}: {error.reason}")
    return None


def _integers(values: Any) -> np.ndarray | None:
    """int64 array of a list of integers; None if it is something else."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "iu":
        return values.astype(np.int64)
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        return None
    try:
        return np.array(values, np.int64)
    except OverflowError:
        return None
