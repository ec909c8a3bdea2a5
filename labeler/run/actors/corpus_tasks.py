"""The CPU tasks of a run: corpus pieces to requests, requests to units."""

import functools
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from labeler.config import LabelConfig
from labeler.corpus.documents import RowTokenizer
from labeler.corpus.listing import Piece
from labeler.corpus.piece_reader import KeySnapshot, PieceReader, PieceResult
from labeler.corpus.requests import REQUEST_SCHEMA, to_table
from labeler.run.actors.setup import RunSetup, retry_stores
from labeler.teacher_model.identity import load_tokenizer
from labeler.units.sizing import UNIT_SCHEMA, cut_units, wrapped
from schemas.fault_points import fault_point
from schemas.keys import Keys, stack_keys, unit_key
from schemas.label_set.label_set import LabelSet
from schemas.label_set.roster import write_part
from schemas.spec import LabelSetSpec


def make_reader(config: LabelConfig, spec: LabelSetSpec) -> PieceReader:
    """Creates the corpus reader of a run; loads the tokenizer."""
    rows = RowTokenizer(
        load_tokenizer(config.teacher),
        config.corpus,
        spec.text,
        spec.teacher.vocab_size,
        prompts=config.generate is not None,
    )
    return PieceReader(config.corpus, spec.text, config.generate, rows)


@functools.lru_cache(maxsize=1)
def _open(setup: RunSetup) -> tuple[PieceReader, LabelSet]:
    # Cached: a worker process runs many tasks, and loading a tokenizer takes seconds.
    label_set = LabelSet.open(setup.config.labels)
    return make_reader(setup.config, label_set.spec), label_set


class _Claims:
    """Claims rows for one piece; remembers whether the run is stopping."""

    def __init__(self, ledger: Any, piece: int) -> None:
        self._ledger, self._piece = ledger, piece
        self.is_stopping = False

    def __call__(self, keys: Keys) -> npt.NDArray[np.bool_]:
        import ray

        claimed, self.is_stopping = ray.get(self._ledger.claim.remote(self._piece, keys))
        return claimed


def read_pieces(batch: pa.Table, setup: RunSetup, frozen: Any, ledger: Any) -> Iterator[pa.Table]:
    """Yields the requests of pieces; after each piece, writes its roster part and bad rows.

    Args:
        batch: column ``piece``, pickled.
        setup: constants of the run.
        frozen: Ray reference to the ``KeySnapshot`` of the run.
        ledger: actor handle.
    """
    import ray

    retry_stores(setup, ledger)
    reader, label_set = _open(setup)
    known: KeySnapshot = ray.get(frozen)
    yield REQUEST_SCHEMA.empty_table()  # Ray Data needs a block even if all rows are labelled
    for packed in batch.column("piece").to_pylist():
        if ray.get(ledger.is_stopping.remote()):
            return
        piece: Piece = pickle.loads(packed)
        claims, result = _Claims(ledger, piece.index), PieceResult()
        for requests in reader.requests(piece, known, claims, result):
            if claims.is_stopping:
                return  # without a roster part: a stopped run writes no roster
            yield to_table(requests)
        _commit_piece(label_set, setup, known, result)
        ray.get(ledger.piece_read.remote(piece.index, piece.size_bytes))


def _commit_piece(
    label_set: LabelSet, setup: RunSetup, frozen: KeySnapshot, result: PieceResult
) -> None:
    bad = result.newly_quarantined(frozen)
    if bad:
        keys = unit_key(stack_keys([row.row_key for row in bad]))
        label_set.commit_unit(None, bad, {"stage": "tokenise"}, keys)
    if result.roster:
        fault_point("before_roster_part")
        write_part(label_set.store, setup.run, result.roster_part())


def cut_into_units(requests: pa.Table, setup: RunSetup) -> Iterator[pa.Table]:
    """Yields units of about equally many tokens, one per row."""
    generation = setup.config.generate
    generated_tokens = 0 if generation is None else generation.max_tokens
    yield UNIT_SCHEMA.empty_table()  # Ray Data needs a block
    for unit in cut_units(requests, setup.config.run.unit_tokens, generated_tokens):
        yield wrapped(unit)
