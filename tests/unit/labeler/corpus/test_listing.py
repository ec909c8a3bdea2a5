"""The corpus as pieces and rows: every row once, known by its place, bad ones with a reason."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from labeler.config import CorpusConfig
from labeler.corpus.listing import list_corpus
from labeler.corpus.readers import SourceRow, read_piece
from schemas.errors import CorpusError, StoreError


def reason(row: SourceRow) -> str:
    return row.failure.reason if row.failure else ""


def read_all(corpus: CorpusConfig) -> list[SourceRow]:
    return [row for piece in list_corpus(corpus) for row in read_piece(piece, corpus)]


def jsonl(path: Path, lines: list[Any]) -> bytes:
    data = b"".join(
        (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines
    )
    path.write_bytes(data)
    return data


@pytest.mark.parametrize("piece_bytes", [1, 2, 7, 16, 33, 10_000])
@pytest.mark.parametrize("last_newline", [True, False])
def test_jsonl_lines_belong_to_one_piece_each(
    tmp_path: Path, piece_bytes: int, last_newline: bool
) -> None:
    lines = [{"text": "x" * n} for n in (0, 1, 30, 2, 2, 50, 7)]
    data = jsonl(tmp_path / "a.jsonl", lines)
    if not last_newline:
        (tmp_path / "a.jsonl").write_bytes(data[:-1])
    corpus = CorpusConfig(path=str(tmp_path), format="jsonl", piece_bytes=piece_bytes)
    rows = read_all(corpus)
    assert [row.values["text"] for row in rows] == [line["text"] for line in lines]
    for row in rows:  # a place is where the line begins
        assert json.loads(data[row.place :].splitlines()[0]) == row.values


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".gz", lambda parts: b"".join(map(gzip.compress, parts))),
        (".zst", lambda parts: b"".join(map(zstandard.ZstdCompressor().compress, parts))),
    ],
)
def test_compressed_jsonl_has_the_places_of_the_plain_one(
    tmp_path: Path, suffix: str, compress: Callable[[list[bytes]], bytes]
) -> None:
    data = jsonl(tmp_path / "a.jsonl", [{"text": "ab" * n} for n in range(20)])
    plain = read_all(CorpusConfig(path=str(tmp_path / "a.jsonl"), format="jsonl"))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress([data[:100], data[100:]]))  # several members or frames
    corpus = CorpusConfig(path=str(path), format="jsonl", piece_bytes=10)
    rows = read_all(corpus)
    assert [(r.place, r.values) for r in rows] == [(r.place, r.values) for r in plain]


def test_truncated_gzip_ends_with_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    text = b"".join(json.dumps({"text": str(n)}).encode() + b"\n" for n in range(20_000))
    path.write_bytes(gzip.compress(text)[:-100])
    corpus = CorpusConfig(path=str(path), format="jsonl")
    with pytest.raises(CorpusError, match=r"cannot read .*a\.jsonl\.gz .*Truncated"):
        read_all(corpus)


def test_bad_jsonl_rows_keep_their_places(tmp_path: Path) -> None:
    good = {"text": "fine", "extra": 1}
    bad = [b"{not json", b'{"text": "\xff"}', b"[1]", b'{"other": 1}', b"", b"  "]
    data = jsonl(tmp_path / "a.jsonl", [good, *bad, good])
    rows = read_all(CorpusConfig(path=str(tmp_path), format="jsonl", keep_columns=("extra",)))
    assert [reason(row) for row in rows] == [
        "", "bad_json", "invalid_utf8", "wrong_type", "missing_column", "",
    ]  # fmt: skip
    assert rows[0].values == good
    assert rows[1].place == data.index(b"{not")
    assert rows[0].source == str(tmp_path / "a.jsonl")


def test_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfx")
    (row,) = read_all(CorpusConfig(path=str(tmp_path), format="jsonl"))
    assert row.values["text"] == "x"
    (row,) = read_all(CorpusConfig(path=str(tmp_path), format="text", glob="*.txt"))
    assert row.values["text"] == "x"


def test_parquet_rows_are_numbered_across_row_groups(tmp_path: Path) -> None:
    texts = [f"row {n}" for n in range(100)]
    table = pa.table({"text": texts, "id": range(100), "unused": range(100)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    corpus = CorpusConfig(path=str(tmp_path), piece_bytes=300, keep_columns=("id",))
    pieces = list_corpus(corpus)
    assert len(pieces) > 3
    assert [piece.index for piece in pieces] == list(range(len(pieces)))
    rows = read_all(corpus)
    assert [row.place for row in rows] == list(range(100))
    assert [row.values for row in rows] == [{"text": t, "id": n} for n, t in enumerate(texts)]


def test_parquet_row_that_is_no_utf8_is_one_bad_row(tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"\xff\xfe", None], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    rows = read_all(CorpusConfig(path=str(tmp_path)))
    assert [reason(row) for row in rows] == ["", "invalid_utf8", ""]
    assert rows[2].values == {"text": None}


def test_parquet_token_ids_come_as_arrays(tmp_path: Path) -> None:
    ids = pa.array([[1, 2], None, [], [3]], pa.list_(pa.int64()))
    pq.write_table(pa.table({"token_ids": ids}), tmp_path / "a.parquet")
    rows = read_all(CorpusConfig(path=str(tmp_path), kind="ids"))
    values = [row.values["token_ids"] for row in rows]
    assert values[1] is None
    assert [v.tolist() for v in (values[0], values[2], values[3])] == [[1, 2], [], [3]]
    assert isinstance(values[0], np.ndarray)


def test_text_files_are_documents(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / ".git").mkdir()
    for name, data in {
        "b.py": b"print()", "deep/a.py": b"\xff", "c.txt": b"no", ".git/x.py": b"no", "e.py": b"",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(data)
    corpus = CorpusConfig(path=str(tmp_path), format="text", glob="**/*.py", piece_bytes=5)
    rows = read_all(corpus)
    assert [(Path(r.source).name, r.place, reason(r)) for r in rows] == [
        ("b.py", 0, ""), ("a.py", 0, "invalid_utf8"), ("e.py", 0, ""),
    ]  # fmt: skip
    assert len(list_corpus(corpus)) == 2


def test_text_file_that_is_gone_is_one_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    corpus = CorpusConfig(path=str(tmp_path), format="text")
    (piece,) = list_corpus(corpus)
    (tmp_path / "a.txt").unlink()
    assert [reason(row) for row in read_piece(piece, corpus)] == ["unreadable_file", ""]


def test_names_of_files_need_not_be_utf8(tmp_path: Path) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"\xff.txt")
    try:
        with open(path, "wb") as file:
            file.write(b"x")
    except OSError:
        pytest.skip("this file system refuses such names")
    (row,) = read_all(CorpusConfig(path=str(tmp_path), format="text"))
    assert row.values == {"text": "x"}
    assert row.source.endswith("\\xff.txt")


def test_hf_dataset_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": [f"row {n}" for n in range(2500)]})
    data.save_to_disk(tmp_path / "set")
    corpus = CorpusConfig(path=str(tmp_path / "set"), format="hf", piece_bytes=1000)
    assert len(list_corpus(corpus)) == 3  # batches of 1000 rows
    rows = read_all(corpus)
    assert [row.place for row in rows] == list(range(2500))
    assert rows[2400].values == {"text": "row 2400"}
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "dict")
    with pytest.raises(CorpusError, match="holds the splits train; name one of them"):
        list_corpus(CorpusConfig(path=str(tmp_path / "dict"), format="hf"))
    with pytest.raises(CorpusError, match=r"it has no state\.json"):
        list_corpus(CorpusConfig(path=str(tmp_path), format="hf"))


def test_listing_takes_globs_and_relative_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.jsonl", "b.jsonl", "c.json"):
        jsonl(tmp_path / "in" / name, [{"text": name}])
    monkeypatch.chdir(tmp_path)
    rows = read_all(CorpusConfig(path="in/*.jsonl", format="jsonl"))
    assert [(row.source, row.values["text"]) for row in rows] == [
        ("in/a.jsonl", "a.jsonl"), ("in/b.jsonl", "b.jsonl"),
    ]  # fmt: skip


def test_memory_filesystem() -> None:
    fsspec = pytest.importorskip("fsspec")
    fs = fsspec.filesystem("memory")
    fs.pipe("/corpus/a.jsonl", b'{"text": "x"}\n{"text": "y"}\n')
    rows = read_all(CorpusConfig(path="memory://corpus", format="jsonl", piece_bytes=3))
    assert [(row.source, row.place) for row in rows] == [
        ("memory:///corpus/a.jsonl", 0), ("memory:///corpus/a.jsonl", 14),
    ]  # fmt: skip
    fs.rm("/corpus", recursive=True)


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="does not exist"):
        list_corpus(CorpusConfig(path=str(tmp_path / "none")))
    with pytest.raises(CorpusError, match=r"no file matches corpus\.path"):
        list_corpus(CorpusConfig(path=str(tmp_path / "*.parquet")))
    with pytest.raises(CorpusError, match=r"matches \*\*/\*\.parquet .0 files found"):
        list_corpus(CorpusConfig(path=str(tmp_path)))
    (tmp_path / "a.parquet").write_bytes(b"nonsense")
    with pytest.raises(CorpusError, match=r"cannot read .*a\.parquet as parquet"):
        list_corpus(CorpusConfig(path=str(tmp_path)))
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r'a\.parquet has no column "text"; .* are body, n'):
        list_corpus(CorpusConfig(path=str(tmp_path)))
    with pytest.raises(CorpusError, match=r'column "n" of .*a\.parquet holds int64'):
        list_corpus(CorpusConfig(path=str(tmp_path), column="n"))
    jsonl(tmp_path / "a.jsonl", [{"body": "x"}])
    with pytest.raises(CorpusError, match=r'a\.jsonl has no column "text"; its columns are body'):
        list_corpus(CorpusConfig(path=str(tmp_path), format="jsonl"))
    (tmp_path / "a.jsonl").write_bytes(b"")
    with pytest.raises(CorpusError, match="1 files, but no rows"):
        list_corpus(CorpusConfig(path=str(tmp_path), format="jsonl"))


def test_unreadable_corpus_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(fsspec.filesystem("memory"), "exists", fail)
    with pytest.raises(StoreError, match=r"^memory://c: .*Access Denied\); check credentials"):
        list_corpus(CorpusConfig(path="memory://c"))
