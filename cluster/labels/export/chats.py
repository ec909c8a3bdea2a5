"""Prompts and sampled responses of a label set as chat messages."""

import json
import os
from typing import Any

from schemas.errors import ConfigError, DamagedError, MissingError, first_line
from schemas.label_set.label_set import LabelSet
from schemas.label_set.roster import LABELLED, REUSED, finished_runs, read_roster
from schemas.record.rows import LabelRows
from schemas.vocabulary import vocabulary_differences


class Chats:
    """Turns rows into chat messages."""

    def __init__(self, label_set: LabelSet, tokenizer: str | None) -> None:
        """Loads the tokenizer, and each row's origin from the rosters.

        Raises:
            ConfigError: the set has no sampled responses, or the tokenizer cannot be loaded.
        """
        if label_set.spec.generation is None:
            raise ConfigError(
                f"{label_set.url}: has no sampled responses (it was made without [generate]); "
                "export chats from a label set made with [generate]"
            )
        self._url = label_set.url
        self._tokenizer = _load(label_set, tokenizer)
        self._special = set(self._tokenizer.all_special_ids) - {self._tokenizer.bos_token_id}
        self._origins = _read_origins(label_set)

    def rows(self, rows: LabelRows) -> list[dict[str, Any]]:
        """One object per row: messages, row_key, source, place, sample.

        Raises:
            ConfigError: the prompts are rendered chats and their messages were not kept.
        """
        return [self._row(rows, number) for number in range(len(rows))]

    def _row(self, rows: LabelRows, number: int) -> dict[str, Any]:
        ids = rows.token_ids[rows.token_offsets[number] : rows.token_offsets[number + 1]]
        spans = rows.label_spans[rows.span_offsets[number] : rows.span_offsets[number + 1]]
        start = int(spans[0])  # generated rows have one span: the response, up to its end
        key = rows.row_key[number].tobytes()
        source, place, sample, columns = self._origins.get(key, ("", -1, -1, {}))
        response = self._tokenizer.decode(ids[start:].tolist(), skip_special_tokens=True)
        prompt = self._prompt(ids[:start].tolist(), columns)
        return {
            "messages": [*prompt, {"role": "assistant", "content": response}],
            "row_key": key.hex(),
            "source": source,
            "place": place,
            "sample": sample,
        }

    def _prompt(self, ids: list[int], columns: dict[str, Any]) -> list[dict[str, str]]:
        """The source's messages if kept, else the prompt's text as a user message."""
        kept = columns.get("messages")
        if isinstance(kept, str):
            kept = json.loads(kept)
        if kept:
            return [{"role": str(m["role"]), "content": str(m["content"])} for m in kept]
        if self._special.intersection(ids):
            raise ConfigError(
                f"{self._url}: prompts are chats rendered with the teacher's template, which "
                'cannot be parsed back; label with corpus.keep_columns = ["messages"] to keep them'
            )
        return [{"role": "user", "content": self._tokenizer.decode(ids, skip_special_tokens=True)}]


def _load(label_set: LabelSet, tokenizer: str | None) -> Any:
    recorded = sorted({str(m.provenance.get("model", "")) for m in label_set.manifests()} - {""})
    name = tokenizer or (recorded[0] if recorded else "")
    if not name:
        raise ConfigError(
            f"{label_set.url}: no manifest records the teacher's model; name its tokenizer with "
            "--tokenizer"
        )
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # tokenizers raises plain Exception on a bad file
        raise ConfigError(
            f"no tokenizer can be loaded from {name} (working directory {os.getcwd()}): "
            f"{first_line(error)}; name the teacher's with --tokenizer"
        ) from error
    _check_same(label_set, found, name)
    return found


def _check_same(label_set: LabelSet, tokenizer: Any, name: str) -> None:
    """Refuses a tokenizer with another vocabulary: it would decode the ids to different text."""
    if not label_set.vocabulary_file:
        return
    try:
        kept = label_set.vocabulary()
    except (MissingError, DamagedError):
        return  # `verify` reports it; the tokenizer may well be the right one
    count, shown = vocabulary_differences(kept, tokenizer.get_vocab(), "the labels", name)
    if count:
        raise ConfigError(
            f"the tokenizer {name} does not match {label_set.url}: {count} tokens differ "
            f"({shown}); name the teacher's with --tokenizer"
        )


def _read_origins(label_set: LabelSet) -> dict[bytes, tuple[str, int, int, dict[str, Any]]]:
    """Source, place, sample and kept columns of all rows used by finished runs, by row key."""
    found: dict[bytes, tuple[str, int, int, dict[str, Any]]] = {}
    for run in finished_runs(label_set):
        for row in read_roster(label_set, run).to_pylist():
            if row["disposition"] in (LABELLED, REUSED):
                columns = json.loads(row["columns"]) if row["columns"] else {}
                origin = (row["source"], row["place"], row["sample"], columns)
                found.setdefault(row["row_key"], origin)
    return found
