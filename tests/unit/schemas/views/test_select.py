"""`labels view`: filters, samples, mixtures and splits, all by key, without opening a shard."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.__main__ import main
from schemas.errors import ConfigError, StoreError
from schemas.keys import unit_key
from schemas.label_set.label_set import LabelSet
from schemas.label_set.roster import close_roster, write_part
from schemas.label_set.tables import key_array
from schemas.spec import RecordSpec
from schemas.views.select import Selection, make_views
from schemas.views.view import View
from tests.support.label_rows import make_rows, make_spec

VOCAB = 60
SPEC = make_spec(RecordSpec(kind="topk", k=8), VOCAB)
WINDOWS = 3


def make_run(
    url: str,
    run: str,
    seed: int,
    documents: int = 30,
    order: list[int] | None = None,
    name: str = "",
) -> LabelSet:
    """A closed run over documents of three windows each; `order` shuffles the corpus."""
    label_set = LabelSet.create_or_open(url, SPEC)
    rows = make_rows(documents * WINDOWS, SPEC.record, VOCAB, seed=seed, min_tokens=6)
    frozen = label_set.committed_keys()
    for first in range(0, len(rows), 20):
        part = rows.slice(first, first + 20)
        label_set.commit_unit(part, [], {}, unit_key(part.row_key))
    places = order if order is not None else list(range(documents))
    document = np.repeat(np.arange(documents), WINDOWS)
    part = {
        "row_key": [key.tobytes() for key in rows.row_key],
        "source": [f"{name}{'a.py' if d % 2 else 'b.txt'}" for d in document],
        "place": pa.array([places[d] for d in document], pa.int64()),
        "window": pa.array(list(range(WINDOWS)) * documents, pa.int32()),
        "sample": pa.array([-1] * len(rows), pa.int32()),
        "columns": [json.dumps({"lang": "de" if d < 10 else "fr", "id": int(d)}) for d in document],
    }
    write_part(label_set.store, run, pa.table(part))
    close_roster(label_set, run, frozen)
    return label_set


@pytest.fixture(autouse=True)
def no_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a shard was read")

    monkeypatch.setattr("schemas.label_set.label_set.read_row_group", refuse)


def one(tmp_path: Path, name: str, *sources: str, **fields: Any) -> View:
    (view,) = make_views(
        str(tmp_path / name), str(tmp_path / f"{name}-held"), Selection(sources=sources, **fields)
    )
    return view


def keys(view: View) -> set[bytes]:
    found = view.table.column("row_key").to_pylist()
    assert len(set(found)) == len(found)
    return set(found)


def test_filters_over_roster_and_kept_columns(tmp_path: Path) -> None:
    url = str(tmp_path / "a")
    make_run(url, "r1", 1)
    everything = one(tmp_path, "all", url)
    assert everything.num_rows == 90
    german = one(tmp_path, "de", url, where="lang == 'de' and source.endswith('.py')")
    assert german.num_rows == 5 * WINDOWS
    assert set(german.table.column("source").to_pylist()) == {"a.py"}
    long = one(tmp_path, "long", url, where="num_labels / num_tokens > 0.9 or id == 3")
    assert 3 <= long.num_rows < 90
    first = one(tmp_path, "first", url, where="window == 0 and run == 'r1'")
    assert first.num_rows == 30
    again = View.open(first.url)
    assert again.view_hash == first.view_hash
    made = json.loads((tmp_path / "first" / "view.json").read_text())["selection"]
    assert made == {"sources": [url], "where": "window == 0 and run == 'r1'"}
    again.check_shards()
    with pytest.raises(ConfigError, match=r"no column nothing.*id, label_set, lang, num_labels"):
        one(tmp_path, "x", url, where="nothing == 1")
    with pytest.raises(ConfigError, match="leaves none of 90 rows"):
        one(tmp_path, "x", url, where="num_labels > 100000")
    with pytest.raises(ConfigError, match=r"columns: .*lang string"):
        one(tmp_path, "x", url, where="lang > 1")


def test_samples_are_by_key(tmp_path: Path) -> None:
    url = str(tmp_path / "a")
    make_run(url, "r1", 1)
    third = one(tmp_path, "third", url, sample=0.3)
    assert 15 <= third.num_rows <= 40
    assert keys(third) == keys(one(tmp_path, "again", url, sample=0.3))
    assert keys(third) != keys(one(tmp_path, "other", url, sample=0.3, seed=1))
    assert keys(third) <= keys(one(tmp_path, "more", url, sample=0.6))
    exactly = one(tmp_path, "exactly", url, sample=17)
    assert exactly.num_rows == 17
    # A filter leaves the choice of the other rows alone.
    some = one(tmp_path, "some", url, sample=0.3, where="id < 20")
    assert keys(some) <= keys(third)


def test_split_keeps_documents_together_and_survives_a_shuffle(tmp_path: Path) -> None:
    sides = []
    for name, order in (("a", None), ("b", list(range(29, -1, -1)))):
        url = str(tmp_path / name)
        make_run(url, "r1", 1, order=order, name="elsewhere/" if order else "")
        train, held = make_views(
            f"{tmp_path}/{name}-train", f"{tmp_path}/{name}-held",
            Selection(sources=(url,), holdout=0.3),
        )  # fmt: skip
        assert train.num_rows + held.num_rows == 90
        assert not keys(train) & keys(held)
        assert held.num_rows % WINDOWS == 0
        assert 3 <= held.num_rows // WINDOWS <= 16
        sides.append(keys(held))
    assert sides[0] == sides[1]
    rows = make_rows(90, SPEC.record, VOCAB, seed=1, min_tokens=6).row_key
    held_rows = [row.tobytes() in sides[0] for row in rows]
    assert all(len(set(held_rows[n : n + WINDOWS])) == 1 for n in range(0, 90, WINDOWS))


def test_mixtures_keep_shares(tmp_path: Path) -> None:
    urls = [str(tmp_path / name) for name in "ab"]
    make_run(urls[0], "r1", 1)
    make_run(urls[1], "r1", 2, documents=10)
    view = one(tmp_path, "mix", *urls, weights=(2.0, 1.0))
    counts = np.bincount(view.table.column("label_set").to_numpy())
    assert counts.tolist() == [60, 30]
    assert [source.run for source in view.sources] == ["r1", "r1"]
    assert view.label_sets[1].url.endswith("b")
    half = one(tmp_path, "half", *urls, weights=(1.0, 1.0))
    assert np.bincount(half.table.column("label_set").to_numpy()).tolist() == [30, 30]
    assert keys(half) <= keys(one(tmp_path, "all", *urls))
    only = one(tmp_path, "only", *urls, where=f"label_set == '{urls[1]}'")
    assert [source.url for source in only.sources] == ["../b"]
    assert only.num_rows == 30
    with pytest.raises(ConfigError, match="--weights has 1 values for 2"):
        one(tmp_path, "x", *urls, weights=(1.0,))


def test_runs_of_one_set(tmp_path: Path) -> None:
    url = str(tmp_path / "a")
    make_run(url, "r1", 1)
    label_set = make_run(url, "r2", 2, documents=5)
    assert one(tmp_path, "both", url).num_rows == 105
    assert one(tmp_path, "first", f"{url}:r1").num_rows == 90
    assert one(tmp_path, "second", f"{url}:r2", f"{url}:r1").sources[0].run == "r2"
    with pytest.raises(StoreError, match="no finished run r9; finished runs: r1, r2"):
        one(tmp_path, "x", f"{url}:r9")
    label_set.drop_unit(label_set.manifests()[0].unit_key)
    with pytest.raises(StoreError, match="units were dropped"):
        one(tmp_path, "x", url)
    LabelSet.create_or_open(str(tmp_path / "empty"), SPEC)
    with pytest.raises(StoreError, match="empty: no finished run"):
        one(tmp_path, "x", str(tmp_path / "empty"))


def test_view_command_prints_its_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = str(tmp_path / "a")
    make_run(url, "r1", 1)
    out, facts = tmp_path / "views", tmp_path / "out.json"
    words = ["labels", "view", str(out), "--from", url, "--where", "num_labels >= 2"]
    assert main([*words, "--holdout", "0.2", "--sample", "40", "--json", str(facts)]) == 0
    train, held = View.open(f"{out}/train"), View.open(f"{out}/heldout")
    assert train.num_rows == 40
    assert f"{out}/heldout: {held.num_rows} rows" in capsys.readouterr().out
    assert [view["rows"] for view in json.loads(facts.read_text())["views"]] == [40, held.num_rows]
    assert key_array(train.table, "row_key").shape == (40, 16)
    for bad in (["--holdout", "1.5"], ["--sample", "x"], ["--weights", "1,2"], ["--sample", "0"]):
        assert main([*words, *bad]) == 1
    assert "error: --sample is '0'" in capsys.readouterr().err
