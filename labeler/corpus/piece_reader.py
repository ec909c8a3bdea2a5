"""One tokenising task: turns a corpus piece into requests for rows without labels.

Every row read is recorded in the roster part of its piece, whatever its outcome. Rows that yield no
document are quarantined immediately, as a separate unit, without a teacher.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from labeler.config import CorpusConfig
from labeler.corpus.documents import RowTokenizer
from labeler.corpus.listing import Piece
from labeler.corpus.readers import SourceRow, read_piece
from labeler.corpus.requests import NOT_GENERATED, Request, label_request, sample_requests
from labeler.corpus.windows import Document, cut_windows
from schemas.errors import RowFailure
from schemas.keys import Keys, SortedKeys, contains, place_key, stack_keys
from schemas.label_set.label_set import QuarantineRow
from schemas.spec import GenerationSpec, TextSpec

CHUNK_ROWS = 256
"""Rows tokenised in one call."""

DETAIL_CHARACTERS = 300
"""Maximum length of the detail of a bad row, because it may quote the row."""

Claim = Callable[[Keys], npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class KeySnapshot:
    """Keys of the label set at the start of the run; fixed, so that decisions are stable."""

    committed: SortedKeys
    quarantined: SortedKeys
    retry_quarantined: bool

    def missing(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Returns bool [R]: which of ``keys``, uint8 [R, 16], this run must label."""
        missing = ~contains(self.committed, keys)
        if not self.retry_quarantined:
            missing &= ~contains(self.quarantined, keys)
        return missing


class RosterRow(NamedTuple):
    """One row that was read; ``columns`` is JSON of the kept source columns."""

    row_key: bytes
    source: str
    place: int
    window: int
    sample: int
    columns: str


@dataclass
class PieceResult:
    """The outcome of a piece; complete once the piece is fully read."""

    roster: list[RosterRow] = field(default_factory=list)
    quarantined: list[QuarantineRow] = field(default_factory=list)
    rows_sent: int = 0

    def roster_part(self) -> pa.Table:
        """All rows that were read, at least one, as a table to store."""
        return pa.table(dict(zip(RosterRow._fields, zip(*self.roster, strict=True), strict=True)))

    def newly_quarantined(self, frozen: KeySnapshot) -> list[QuarantineRow]:
        """Returns the rows that no earlier run quarantined, without duplicates."""
        rows = {row.row_key: row for row in self.quarantined}
        if not rows:
            return []
        known = contains(frozen.quarantined, stack_keys(list(rows)))
        return [row for row, old in zip(rows.values(), known, strict=True) if not old]


class PieceReader:
    """Reads pieces of one corpus; created once per process."""

    def __init__(
        self,
        corpus: CorpusConfig,
        text: TextSpec,
        generation: GenerationSpec | None,
        rows: RowTokenizer,
    ) -> None:
        self._corpus = corpus
        self._text = text
        self._generation = generation
        self._rows = rows

    def requests(
        self, piece: Piece, frozen: KeySnapshot, claim: Claim, result: PieceResult
    ) -> Iterator[list[Request]]:
        """Yields the requests to label and fills in ``result``.

        Args:
            piece: The piece to read.
            frozen: Keys that are already labelled.
            claim: Returns which of some distinct keys this piece labels.
            result: Complete once the iteration ends.

        Raises:
            CorpusError: A file cannot be read any further.
        """
        seen: set[bytes] = set()
        for chunk in _chunks(read_piece(piece, self._corpus)):
            requests = self._make_requests(chunk, result)
            if not requests:
                continue
            wanted = _first_missing(requests, frozen, seen)
            if wanted:
                claimed = claim(stack_keys([request.row_key for request in wanted]))
                wanted = [request for request, mine in zip(wanted, claimed, strict=True) if mine]
            result.rows_sent += len(wanted)
            if wanted:
                yield wanted

    def _make_requests(self, chunk: Sequence[SourceRow], result: PieceResult) -> list[Request]:
        requests = []
        for row, document in zip(chunk, self._rows.documents(chunk), strict=True):
            columns = self._kept_columns(row)
            made = document if isinstance(document, RowFailure) else self._cut(document, row)
            if isinstance(made, RowFailure):
                # Keyed by place, because there is no content to derive a key from.
                key = place_key(row.source, row.place, 0)
                detail = _printable(made.detail)
                result.quarantined.append(
                    QuarantineRow(key, row.source, row.place, 0, made.reason, detail)
                )
                roster = [RosterRow(key, row.source, row.place, 0, NOT_GENERATED, columns)]
            else:
                requests += made
                roster = [
                    RosterRow(r.row_key, r.source, r.place, r.window, r.sample, columns)
                    for r in made
                ]
            result.roster += roster
        return requests

    def _cut(self, document: Document, row: SourceRow) -> list[Request] | RowFailure:
        ids, spans = document.token_ids, document.spans
        longest = self._text.max_tokens
        if self._generation is not None:
            longest -= self._generation.max_tokens
        if len(ids) > longest and (self._generation is not None or not self._text.split_long):
            return RowFailure("too_long", f"{len(ids)} tokens; at most {longest} fit")
        if self._generation is not None:
            return sample_requests(ids, self._generation, row.source, row.place)
        return [
            label_request(ids[w.start : w.end], w.spans, row.source, row.place, w.index)
            for w in cut_windows(len(ids), spans, self._text.max_tokens, self._text.overlap)
        ]

    def _kept_columns(self, row: SourceRow) -> str:
        kept = {name: row.values.get(name) for name in self._corpus.keep_columns}
        return json.dumps(kept, default=_json_value) if kept else ""


def _chunks(rows: Iterable[SourceRow]) -> Iterator[list[SourceRow]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, CHUNK_ROWS)):
        yield chunk


def _printable(detail: str) -> str:
    """Truncates a detail and escapes unpaired surrogates, which UTF-8 cannot encode."""
    return detail[:DETAIL_CHARACTERS].encode(errors="backslashreplace").decode()


def _json_value(value: Any) -> Any:
    """Converts other types to JSON: arrays to lists, dates and the rest to text."""
    return value.tolist() if isinstance(value, np.ndarray) else str(value)


def _first_missing(requests: list[Request], frozen: KeySnapshot, seen: set[bytes]) -> list[Request]:
    """Returns the unlabelled requests that occur for the first time in their piece."""
    found = []
    missing = frozen.missing(stack_keys([request.row_key for request in requests]))
    for request, is_missing in zip(requests, missing, strict=True):
        if is_missing and request.row_key not in seen:
            seen.add(request.row_key)
            found.append(request)
    return found
