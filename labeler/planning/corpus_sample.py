"""Counts rows and tokens of a corpus: exactly if it is small, else from a random sample."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from labeler.corpus.listing import Piece
from labeler.corpus.piece_reader import KeySnapshot, PieceReader, PieceResult
from labeler.corpus.requests import Request
from schemas.config import StrictModel
from schemas.keys import Keys
from schemas.record.spans import span_targets

WHOLE_BYTES = 32 * 2**20
"""A corpus of at most this size is read completely, so that its counts are exact."""

SAMPLE_BYTES = 16 * 2**20
"""Approximate bytes sampled from a larger corpus; at least ``MIN_PIECES`` pieces."""

MIN_PIECES = 8

KEPT_TOKENS = 2**20
"""Tokens of the requests kept for calibration."""

COUNTS = ("rows_read", "rows", "tokens", "labels")

OnPiece = Callable[[int, int, int], None]
"""Called with pieces read, pieces to read, and tokens found so far."""


class Range(StrictModel):
    """An expected value with its range."""

    expected: float
    low: float
    high: float


@dataclass(frozen=True)
class CorpusSample:
    """Counts of a corpus from a sample of its pieces.

    Attributes:
        is_whole: whether the full corpus was read, so that the counts are exact.
        pieces_read, pieces: number of pieces in the sample and in the corpus.
        corpus_bytes: bytes of all pieces.
        counts: counts of the corpus, keyed by ``COUNTS``: rows read, rows that a run would label,
            and their tokens and labels. Each sample of a prompt counts as a row, with the prompt's
            tokens and no labels.
        requests: some of the requests that a run would label, shuffled.
        tokens_per_s: speed of reading and tokenising on one CPU.
    """

    is_whole: bool
    pieces_read: int
    pieces: int
    corpus_bytes: int
    counts: dict[str, Range]
    requests: list[Request]
    tokens_per_s: float


def sample_corpus(
    pieces: list[Piece],
    reader: PieceReader,
    frozen: KeySnapshot,
    seed: int,
    on_piece: OnPiece,
) -> CorpusSample:
    """Reads some or all pieces of a corpus.

    Args:
        pieces: all of them.
        reader: reads the corpus.
        frozen: keys of rows that are already labelled.
        seed: determines which pieces are read and which requests are kept.
        on_piece: progress callback.

    Raises:
        CorpusError: a file cannot be read.
    """
    draw = random.Random(seed)
    chosen = _choose(pieces, draw)
    started = time.monotonic()
    requests, found = _read(chosen, reader, frozen, on_piece)
    seconds = max(time.monotonic() - started, 1e-9)
    sizes = np.array([max(piece.size_bytes, 1) for piece in chosen], np.float64)
    corpus_bytes = sum(piece.size_bytes for piece in pieces)
    total = max(corpus_bytes, float(sizes.sum()))
    # Shuffled: requests of one piece are similar, and the calibration takes the first ones.
    draw.shuffle(requests)
    ends = np.cumsum([len(request.token_ids) for request in requests])
    return CorpusSample(
        is_whole=len(chosen) == len(pieces),
        pieces_read=len(chosen),
        pieces=len(pieces),
        corpus_bytes=corpus_bytes,
        counts={name: scale_up(found[:, i], sizes, total) for i, name in enumerate(COUNTS)},
        requests=requests[: int(np.searchsorted(ends, KEPT_TOKENS)) + 1],
        tokens_per_s=float(found[:, COUNTS.index("tokens")].sum()) / seconds,
    )


def _choose(pieces: list[Piece], draw: random.Random) -> list[Piece]:
    if sum(piece.size_bytes for piece in pieces) <= WHOLE_BYTES:
        return pieces
    taken: list[Piece] = []
    size = 0
    for piece in draw.sample(pieces, len(pieces)):
        # At least a few pieces, however large: one may not be representative.
        if len(taken) >= MIN_PIECES and size + piece.size_bytes > SAMPLE_BYTES:
            break
        taken.append(piece)
        size += piece.size_bytes
    return taken


def _read(
    pieces: list[Piece], reader: PieceReader, frozen: KeySnapshot, on_piece: OnPiece
) -> tuple[list[Request], npt.NDArray[np.float64]]:
    """Returns the requests of pieces, and their counts, float64 [pieces, len(COUNTS)]."""
    claimed: set[bytes] = set()

    def claim(keys: Keys) -> npt.NDArray[np.bool_]:
        is_new = [key.tobytes() not in claimed for key in keys]
        claimed.update(key.tobytes() for key in keys)
        return np.array(is_new, bool)

    requests: list[Request] = []
    counts = np.zeros((len(pieces), len(COUNTS)))
    num_tokens = 0
    for index, piece in enumerate(pieces):
        result = PieceResult()
        new = [r for part in reader.requests(piece, frozen, claim, result) for r in part]
        tokens = sum(len(request.token_ids) for request in new)
        labels = sum(len(span_targets(request.label_spans)) for request in new)
        counts[index] = len(result.roster), len(new), tokens, labels
        requests += new
        num_tokens += tokens
        on_piece(index + 1, len(pieces), num_tokens)
    return requests, counts


def scale_up(found: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64], total: float) -> Range:
    """Extrapolates counts of some pieces to the corpus, in proportion to bytes.

    The range assumes that the rest is as sparse as the sparsest piece at the low end, and as dense
    as the densest at the high end; it is a point if everything was read.

    Args:
        found: float64 [pieces read], the count of each piece.
        sizes: float64 [pieces read], bytes.
        total: bytes of the corpus.
    """
    if not len(sizes):
        return Range(expected=0.0, low=0.0, high=0.0)
    counted, rest = float(found.sum()), total - float(sizes.sum())
    rates = found / sizes
    return Range(
        expected=counted + rest * counted / float(sizes.sum()),
        low=counted + rest * float(rates.min()),
        high=counted + rest * float(rates.max()),
    )
