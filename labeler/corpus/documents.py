"""Turns corpus rows into documents: token ids and the spans to label.

=====  =======================================  =============================================
kind   a row                                    what is labelled
=====  =======================================  =============================================
text   a string                                 every token except the first
chat   messages (or a JSON string of them)      the assistant's turns
pair   a prompt and a response                  the response
ids    token ids, optionally with spans         the spans, else every token except the first
=====  =======================================  =============================================

If responses are to be generated, a row is a prompt without spans: the text without EOS, the
messages with the template's opening of an assistant turn, or the token ids.

A row that cannot become a document yields a ``RowFailure`` and does not affect the others.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from labeler.config import CorpusConfig, TextConfig
from labeler.corpus.chat_template import ChatTokenizer
from labeler.corpus.readers import SourceRow
from labeler.corpus.windows import Document, all_but_first
from schemas.errors import ConfigError, RowFailure
from schemas.record.spans import span_problem, unknown_token_problem
from schemas.spec import TextSpec


def text_spec(text: TextConfig, tokenizer: Any, kind: str) -> TextSpec:
    """The text policy of a run; an unset ``add_bos`` follows the tokenizer.

    Raises:
        ConfigError: A requested token is missing from the tokenizer.
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
    """Turns rows of one corpus into documents."""

    def __init__(
        self,
        tokenizer: Any,
        corpus: CorpusConfig,
        text: TextSpec,
        vocab_size: int,
        prompts: bool = False,
    ) -> None:
        """Prepares the tokenizer for a corpus.

        Args:
            tokenizer: A transformers tokenizer.
            corpus: Kind and columns of the corpus.
            text: The BOS and EOS policy.
            vocab_size: Ids are in [0, vocab_size).
            prompts: Rows are prompts to generate from.

        Raises:
            ConfigError: The corpus holds chats, but the tokenizer has no chat template.
        """
        self._tokenizer = tokenizer
        self._corpus = corpus
        self._vocab_size = vocab_size
        self._prompts = prompts
        self._bos = [tokenizer.bos_token_id] if text.add_bos else []
        self._eos = [tokenizer.eos_token_id] if text.add_eos and not prompts else []
        self._chat = ChatTokenizer(tokenizer) if corpus.kind == "chat" else None

    def documents(self, rows: Sequence[SourceRow]) -> list[Document | RowFailure]:
        """Returns one document per row, or the reason for its failure."""
        readable = [row.values for row in rows if row.failure is None]
        kind, text_column = self._corpus.kind, self._corpus.text_column()
        made: Iterable[Document | RowFailure]
        if kind == "pair":
            made = self._pairs(readable)
        elif kind == "text":
            made = self._texts([values[text_column] for values in readable])
        elif kind == "chat":
            made = [self._chat_document(values[text_column]) for values in readable]
        else:
            made = [self._ids_document(values) for values in readable]
        documents = iter(made)
        return [row.failure or self._check(next(documents)) for row in rows]

    def _check(self, document: Document | RowFailure) -> Document | RowFailure:
        """Returns the document, or the reason why a teacher cannot label it."""
        if isinstance(document, RowFailure):
            return document
        ids = document.token_ids
        problem = unknown_token_problem(ids, self._vocab_size)
        if problem:
            return RowFailure("unknown_token", problem)
        if ids.size == 0 or (document.spans.size == 0 and not self._prompts):
            return RowFailure("nothing_to_label", f"none of {ids.size} tokens is to be labelled")
        return document

    def _texts(self, texts: list[Any]) -> list[Document | RowFailure]:
        return [
            ids if isinstance(ids, RowFailure) else self._document([*self._bos, *ids, *self._eos])
            for ids in self._encode(texts)
        ]

    def _document(self, ids: Sequence[int] | np.ndarray) -> Document:
        spans = np.empty(0, np.int32) if self._prompts else all_but_first(len(ids))
        return Document(np.array(ids, np.int32), spans)

    def _pairs(self, rows: list[dict[str, Any]]) -> list[Document | RowFailure]:
        columns = self._corpus.prompt_column, self._corpus.response_column
        prompts = self._encode([values[columns[0]] for values in rows], empty=True)
        responses = self._encode([values[columns[1]] for values in rows])
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
        """Token ids of each text, without special tokens."""
        problems = [_text_problem(text, empty) for text in texts]
        good = [text for text, problem in zip(texts, problems, strict=True) if problem is None]
        if good:
            encoded = iter(
                self._tokenizer(
                    good, add_special_tokens=False, return_attention_mask=False, verbose=False
                )["input_ids"]
            )
        return [next(encoded) if problem is None else problem for problem in problems]

    def _chat_document(self, messages: Any) -> Document | RowFailure:
        assert self._chat is not None
        if isinstance(messages, str):
            try:
                messages = json.loads(messages)
            except (ValueError, RecursionError) as error:
                return RowFailure("bad_json", str(error))
        return self._chat.document(messages, as_prompt=self._prompts)

    def _ids_document(self, values: dict[str, Any]) -> Document | RowFailure:
        ids = _integers(values[self._corpus.text_column()])
        if ids is None:
            return RowFailure("wrong_type", "token ids are not a list of integers")
        if ids.size == 0:
            return RowFailure("empty", "no token ids")
        problem = unknown_token_problem(ids, self._vocab_size)  # before narrowing to 32 bits
        if problem:
            return RowFailure("unknown_token", problem)
        if self._prompts or not self._corpus.spans_column:
            return self._document(ids)
        found = values[self._corpus.spans_column]
        spans = _integers(found)
        if spans is None:
            return RowFailure("bad_spans", f"spans are {found}; expected a list of integers")
        problem = span_problem(spans, len(ids))
        if problem:
            return RowFailure("bad_spans", problem)
        return Document(ids.astype(np.int32), spans.astype(np.int32))


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
    """A list of integers as int64; None for anything else."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "iu":
        return values.astype(np.int64)
    # By type(), because isinstance takes booleans for integers.
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        return None
    try:
        return np.array(values, np.int64)
    except OverflowError:
        return None
