"""What a corpus holds, from all of it where it is small, else from pieces drawn by a seed."""

import math
import random
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from labeler.corpus.listing import Piece
from labeler.corpus.piece_reader import KeySnapshot, PieceReader, PieceResult
from labeler.corpus.requests import Request
from schemas.keys import Keys

WHOLE_BYTES = 32 * 2**20
"""A corpus up to this size is read whole, so that its counts are exact."""

SAMPLE_BYTES = 16 * 2**20
"""What is read of a larger one, about; at least ``MIN_PIECES`` pieces."""

MIN_PIECES = 8

KEPT_TOKENS = 2**20
"""Tokens of requests that are kept to calibrate with; which ones, the seed says."""

COUNTS = ("rows_read", "rows", "tokens", "labels")


@dataclass(frozen=True)
class Estimate:
    """A number of the whole corpus, and its standard error; 0 where it was counted."""

    value: float
    error: float = 0.0


@dataclass(frozen=True)
class CorpusSample:
    """What was found in a sample of a corpus.

    Attributes:
        is_whole: The sample is the corpus.
        pieces_read: Of it.
        counts: What the whole corpus has, by the names of ``COUNTS``: rows that are read, rows that
            a run would label, and the tokens and labels of these. Samples of a prompt count as
            rows, with the prompt's tokens and no labels.
        requests: Some of those that a run would label, in random order.
        tokens_per_s: Speed of reading and tokenising, on one CPU.
    """

    is_whole: bool
    pieces_read: int
    counts: dict[str, Estimate]
    requests: list[Request]
    tokens_per_s: float


def sample_corpus(
    pieces: list[Piece], reader: PieceReader, frozen: KeySnapshot, seed: int
) -> CorpusSample:
    """Reads some or all pieces of a corpus; see ``CorpusSample``.

    Args:
        pieces: all of them.
        reader: of the corpus.
        frozen: what is labelled already.
        seed: which pieces are read, and which requests are kept.

    Raises:
        CorpusError: a file cannot be read.
    """
    draw = random.Random(seed)
    chosen = _chosen(pieces, draw)
    claims: set[bytes] = set()

    def claim(keys: Keys) -> npt.NDArray[np.bool_]:
        new = [key.tobytes() not in claims for key in keys]
        claims.update(key.tobytes() for key in keys)
        return np.array(new, bool)

    found: list[Request] = []
    by_piece = np.zeros((len(chosen), len(COUNTS)))
    started = time.monotonic()
    for index, piece in enumerate(chosen):
        result = PieceResult()
        for requests in reader.requests(piece, frozen, claim, result):
            by_piece[index, 1:] += (
                len(requests),
                sum(len(request.token_ids) for request in requests),
                sum(_num_labels(request) for request in requests),
            )
            found += requests
        by_piece[index, 0] = len(result.roster)
    elapsed = max(time.monotonic() - started, 1e-9)
    sizes = np.array([max(piece.size_bytes, 1) for piece in chosen], np.float64)
    total = float(sum(max(piece.size_bytes, 1) for piece in pieces))
    counts = {
        name: scaled_up(by_piece[:, column], sizes, total, len(pieces))
        for column, name in enumerate(COUNTS)
    }
    draw.shuffle(found)
    return CorpusSample(
        is_whole=len(chosen) == len(pieces),
        pieces_read=len(chosen),
        counts=counts,
        requests=_up_to(found, KEPT_TOKENS),
        tokens_per_s=float(by_piece[:, 2].sum()) / elapsed,
    )


def scaled_up(
    found: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64], total: float, num_pieces: int
) -> Estimate:
    """A count of the whole corpus from those of some pieces, in proportion to their bytes.

    The ratio estimator of survey sampling with its usual standard error (Cochran, Sampling
    Techniques, 3rd edition, 6.4), without replacement.

    Args:
        found: float64 [pieces read].
        sizes: float64 [pieces read], bytes.
        total: bytes of the corpus.
        num_pieces: of the corpus.
    """
    count = len(sizes)
    if not count:
        return Estimate(0.0)
    ratio = float(found.sum() / sizes.sum())
    if count == num_pieces:
        return Estimate(float(found.sum()))
    if count == 1:
        return Estimate(ratio * total, ratio * total)
    spread = float(((found - ratio * sizes) ** 2).sum()) / (count - 1)
    error = num_pieces * math.sqrt((1 - count / num_pieces) * spread / count)
    return Estimate(ratio * total, error)


def _chosen(pieces: list[Piece], draw: random.Random) -> list[Piece]:
    if sum(piece.size_bytes for piece in pieces) <= WHOLE_BYTES:
        return pieces
    shuffled = draw.sample(pieces, len(pieces))
    taken: list[Piece] = []
    size = 0
    for piece in shuffled:
        if len(taken) >= MIN_PIECES and size + piece.size_bytes > SAMPLE_BYTES:
            break
        taken.append(piece)
        size += piece.size_bytes
    return taken


def _up_to(requests: list[Request], tokens: int) -> list[Request]:
    kept = []
    for request in requests:
        if tokens <= 0:
            break
        kept.append(request)
        tokens -= len(request.token_ids)
    return kept


def _num_labels(request: Request) -> int:
    return int((request.label_spans[1::2] - request.label_spans[::2]).sum())
