"""A piece of the corpus as requests: what is missing, once, and a roster of everything."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import AutoTokenizer

from labeler.config import CorpusConfig
from labeler.corpus.documents import RowTokenizer
from labeler.corpus.listing import list_corpus
from labeler.corpus.piece_reader import KeySnapshot, PieceReader, PieceResult
from labeler.corpus.requests import Request, from_table, requests_unit_key, to_table
from labeler.run.actors.ledger import Ledger
from schemas.keys import Keys, keys_to_sorted, stack_keys
from schemas.label_set.tables import quarantine_table
from schemas.spec import GenerationSpec, TextSpec

VOCAB_SIZE = 320
TEXT = TextSpec(max_tokens=32, overlap=4, add_bos=True, add_eos=True, split_long=True)
NOTHING = np.empty(0, "S16")
FRESH = KeySnapshot(NOTHING, NOTHING, retry_quarantined=False)


class Corpus:
    """A JSONL corpus of one piece, and everything that reads it."""

    def __init__(self, folder: Path, model: Path, rows: list[Any], **options: Any) -> None:
        path = folder / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.config = CorpusConfig(path=str(path), format="jsonl", **options)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.ledger = Ledger(bytes_total=path.stat().st_size)

    def read(
        self,
        frozen: KeySnapshot = FRESH,
        text: TextSpec = TEXT,
        generation: GenerationSpec | None = None,
        index: int = 0,
    ) -> tuple[list[Request], PieceResult]:
        (piece,) = list_corpus(self.config)
        rows = RowTokenizer(self.tokenizer, self.config, text, VOCAB_SIZE, generation is not None)
        reader = PieceReader(self.config, text, generation, rows)
        result = PieceResult()

        def claim(keys: Keys) -> Any:
            return self.ledger.claim(index, keys)[0]

        sent = [r for part in reader.requests(piece, frozen, claim, result) for r in part]
        assert result.rows_sent == len(sent)
        return sent, result


def frozen(requests: list[Request], quarantined: bool = False, retry: bool = False) -> KeySnapshot:
    keys = keys_to_sorted(stack_keys([request.row_key for request in requests]))
    return KeySnapshot(*((NOTHING, keys) if quarantined else (keys, NOTHING)), retry)


def test_piece_sends_every_row_once_and_lists_it_in_the_roster(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    rows = [{"text": "a = 1"}, {"text": "b = 2"}, {"text": "a = 1"}, {"text": ""}]
    corpus = Corpus(tmp_path, tiny_model_dir, rows)
    sent, result = corpus.read()
    assert [corpus.tokenizer.decode(r.token_ids) for r in sent] == [
        "<bos>a = 1<eos>", "<bos>b = 2<eos>",
    ]  # fmt: skip
    assert len(result.roster) == 4
    assert result.roster[2].row_key == sent[0].row_key
    (bad,) = result.quarantined
    assert (bad.reason, bad.row_key) == ("empty", result.roster[3].row_key)


def test_piece_read_twice_sends_the_same(tmp_path: Path, tiny_model_dir: Path) -> None:
    corpus = Corpus(tmp_path, tiny_model_dir, [{"text": f"x = {n % 7}"} for n in range(600)])
    first, once = corpus.read()
    second, twice = corpus.read()
    assert [r.row_key for r in first] == [r.row_key for r in second]
    assert len(first) == 7
    assert once.roster == twice.roster
    # Another piece with the same rows has nothing left to claim.
    other, result = corpus.read(index=1)
    assert other == []
    assert len(result.roster) == 600


def test_piece_skips_labelled_and_quarantined_rows(tmp_path: Path, tiny_model_dir: Path) -> None:
    corpus = Corpus(tmp_path, tiny_model_dir, [{"text": "a = 1"}, {"text": "b = 2"}, {"text": ""}])
    sent, result = corpus.read()
    (left,) = corpus.read(frozen(sent[:1]))[0]
    assert left.row_key == sent[1].row_key
    assert corpus.read(frozen(sent))[0] == []
    assert corpus.read(frozen(sent, quarantined=True))[0] == []
    assert len(corpus.read(frozen(sent, quarantined=True, retry=True))[0]) == 2
    known = keys_to_sorted(stack_keys([result.quarantined[0].row_key]))
    assert result.newly_quarantined(FRESH) == result.quarantined
    assert result.newly_quarantined(KeySnapshot(NOTHING, known, False)) == []


def test_long_documents_are_cut_or_quarantined(tmp_path: Path, tiny_model_dir: Path) -> None:
    corpus = Corpus(tmp_path, tiny_model_dir, [{"text": "abcdefgh" * 20}])
    sent, result = corpus.read()
    assert len(sent) > 2
    assert [row.window for row in result.roster] == list(range(len(sent)))
    whole = TEXT.model_copy(update={"split_long": False})
    sent, result = corpus.read(text=whole)
    assert sent == []
    assert [row.reason for row in result.quarantined] == ["too_long"]


def test_kept_columns_are_json(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = [{"text": "a", "id": 7, "tags": ["é"]}, {"text": "b"}]
    corpus = Corpus(tmp_path, tiny_model_dir, rows, keep_columns=("id", "tags"))
    _, result = corpus.read()
    kept = [json.loads(row.columns) for row in result.roster]
    assert kept == [{"id": 7, "tags": ["é"]}, {"id": None, "tags": None}]


def test_excerpt_of_a_bad_row_can_be_stored(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = [{"text": 1, "id": "\ud800"}, {"text": "x" * 900, "id": "\ud800"}, {"\ud800" * 900: 1}]
    corpus = Corpus(tmp_path, tiny_model_dir, rows, keep_columns=("id",))
    whole = TEXT.model_copy(update={"split_long": False})
    _, result = corpus.read(text=whole)
    assert [row.reason for row in result.quarantined] == [
        "wrong_type", "too_long", "missing_column",
    ]  # fmt: skip
    assert len(quarantine_table(result.quarantined)) == 3
    assert json.loads(result.roster_part().column("columns")[0].as_py()) == {"id": "\ud800"}


def test_prompts_are_sent_once_a_sample(tmp_path: Path, tiny_model_dir: Path) -> None:
    corpus = Corpus(tmp_path, tiny_model_dir, [{"text": "def f("}, {"text": "x" * 99}])
    generation = GenerationSpec(n=3, max_tokens=8)
    sent, result = corpus.read(generation=generation)
    assert [request.sample for request in sent] == [0, 1, 2]
    assert len({request.row_key for request in sent}) == 3
    assert len({request.seed() for request in sent}) == 3
    assert all(request.label_spans.size == 0 for request in sent)
    assert [row.reason for row in result.quarantined] == ["too_long"]
    whole = sent[0].with_response(np.array([7, 8], np.int32))
    assert whole.token_ids.tolist() == [*sent[0].token_ids.tolist(), 7, 8]
    assert whole.label_spans.tolist() == [len(sent[0].token_ids), len(sent[0].token_ids) + 2]
    more = GenerationSpec(n=4, max_tokens=8)  # asking for more keeps what is there
    sent, _ = corpus.read(frozen(sent), generation=more)
    assert [request.sample for request in sent] == [3]


def test_requests_survive_arrow(tmp_path: Path, tiny_model_dir: Path) -> None:
    corpus = Corpus(tmp_path, tiny_model_dir, [{"text": "abc " * 30}, {"text": "b = 2"}])
    sent, _ = corpus.read()
    table = pa.concat_tables([to_table(sent[:1]), to_table(sent[1:])]).slice(1)
    for before, after in zip(sent[1:], from_table(table), strict=True):
        np.testing.assert_array_equal(before.token_ids, after.token_ids)
        np.testing.assert_array_equal(before.label_spans, after.label_spans)
        same = ("row_key", "source", "place", "window", "sample")
        assert all(getattr(before, name) == getattr(after, name) for name in same)


def test_key_of_a_unit_ignores_order_but_not_the_salt(tmp_path: Path, tiny_model_dir: Path) -> None:
    corpus = Corpus(tmp_path, tiny_model_dir, [{"text": "a"}, {"text": "b"}])
    sent, _ = corpus.read()
    assert requests_unit_key(sent) == requests_unit_key(sent[::-1])
    assert (
        len(
            {
                requests_unit_key(sent),
                requests_unit_key(sent, "run1"),
                requests_unit_key(sent, "run2"),
            }
        )
        == 3
    )
