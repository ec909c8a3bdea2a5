"""Rosters account for every row read; views pin what they were made from."""

import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from schemas.errors import AccountsError, DamagedError, RecordError, StoreError
from schemas.keys import keys_to_sorted, unit_key
from schemas.label_set import shards
from schemas.label_set.label_set import LabelSet, QuarantineRow
from schemas.label_set.roster import Accounts, close_roster, read_accounts, read_roster, write_part
from schemas.record import LabelRows
from schemas.spec import RecordSpec
from schemas.views.view import View, build_view
from tests.support.label_rows import make_rows, make_spec

VOCAB = 60
RECORD = RecordSpec(kind="topk", k=8)
ROWS = make_rows(12, RECORD, VOCAB)
KEYS = [key.tobytes() for key in ROWS.row_key]
BAD = [bytes([250 + i]) * 16 for i in range(3)]


def part(
    keys: Sequence[bytes], start: int = 0, source: str = "s", columns: str | None = None
) -> pa.Table:
    n = len(keys)
    table = {
        "row_key": pa.array(keys, pa.binary(16)),
        "source": pa.array([source] * n),
        "place": pa.array(range(start, start + n), pa.int64()),
        "window": pa.array([0] * n, pa.int32()),
        "sample": pa.array([-1] * n, pa.int32()),
    }
    return pa.table(table | ({} if columns is None else {"columns": [columns] * n}))


def commit(label_set: LabelSet, rows: LabelRows) -> str:
    return label_set.commit_unit(rows, [], {}, unit_key(rows.row_key)).unit_key


@pytest.fixture
def label_set(tmp_path: Path) -> LabelSet:
    return LabelSet.create_or_open(str(tmp_path / "labels"), make_spec(RECORD, VOCAB))


class TestRoster:
    def test_every_row_is_in_one_count(self, label_set: LabelSet) -> None:
        commit(label_set, ROWS.slice(0, 4))
        frozen = label_set.committed_keys()
        commit(label_set, ROWS.slice(4, 10))
        bad = [QuarantineRow(key, "t", 9, 0, "too_long", "") for key in BAD[:2]]
        label_set.commit_unit(None, bad, {}, "bad")
        write_part(label_set.store, "r", part([*KEYS[2:8], BAD[0]], 0, "b", '{"lang": "py"}'))
        write_part(label_set.store, "r", part([KEYS[3], KEYS[4], BAD[0], BAD[1]], 0, "a"))
        accounts = close_roster(label_set, "r", frozen)
        lengths = np.diff(ROWS.token_offsets)
        assert accounts == Accounts(
            rows_read=11,
            rows_labelled=4,
            rows_reused=2,
            rows_duplicate=3,
            rows_quarantined=2,
            tokens=int(lengths[4:8].sum()),
            labels=int(np.diff(ROWS.label_offsets)[4:8].sum()),
            reasons={"too_long": 2},
        )
        roster = read_roster(label_set, "r")
        assert roster["source"].to_pylist() == ["a"] * 4 + ["b"] * 7
        assert roster["disposition"].to_pylist() == [
            "reused", "labelled", "quarantined", "quarantined",
            "reused", "duplicate", "duplicate", "labelled", "labelled", "labelled", "duplicate",
        ]  # fmt: skip
        assert roster["reason"].to_pylist() == ["", "", "too_long", "too_long"] + [""] * 7
        assert roster["columns"].to_pylist() == [""] * 4 + ['{"lang": "py"}'] * 7

    def test_task_that_runs_twice_overwrites_itself(self, label_set: LabelSet) -> None:
        commit(label_set, ROWS)
        names = {write_part(label_set.store, "r", part(KEYS)) for _ in range(2)}
        assert len(names) == 1
        assert close_roster(label_set, "r").rows_labelled == 12

    def test_places_cut_differently_count_once(self, label_set: LabelSet) -> None:
        commit(label_set, ROWS)
        write_part(label_set.store, "r", part(KEYS[:8]))
        write_part(label_set.store, "r", part(KEYS[4:], 4))
        accounts = close_roster(label_set, "r")
        assert (accounts.rows_read, accounts.rows_duplicate) == (12, 0)

    def test_place_with_two_contents_is_named(self, label_set: LabelSet) -> None:
        commit(label_set, ROWS)
        write_part(label_set.store, "r", part(KEYS[:4], 7))
        write_part(label_set.store, "r", part(KEYS[5:6], 8))
        with pytest.raises(AccountsError, match="s place 8 window 0: each was read twice"):
            close_roster(label_set, "r")

    def test_samples_of_a_prompt_are_rows(self, label_set: LabelSet) -> None:
        commit(label_set, ROWS)
        table = part(KEYS[:4])
        for name, values in (("place", [0, 0, 1, 1]), ("sample", [0, 1, 0, 1])):
            at = table.schema.get_field_index(name)
            column = pa.array(values, table.schema.field(at).type)
            table = table.set_column(at, name, column)
        write_part(label_set.store, "r", table)
        assert close_roster(label_set, "r").rows_labelled == 4

    def test_lost_rows_fail_the_run_and_are_named(self, label_set: LabelSet) -> None:
        commit(label_set, ROWS.slice(0, 6))
        write_part(label_set.store, "r", part(KEYS))
        with pytest.raises(AccountsError) as caught:
            close_roster(label_set, "r")
        message = str(caught.value)
        assert message.startswith("6 of 12 rows: s place 6 window 0, s place 7 window 0")
        assert "and 1 more" in message
        assert "neither labelled nor quarantined" in message
        commit(label_set, ROWS.slice(6, 12))
        assert close_roster(label_set, "r").rows_labelled == 12

    def test_frozen_key_that_is_gone_is_named(self, label_set: LabelSet) -> None:
        write_part(label_set.store, "r", part(KEYS[:2]))
        with pytest.raises(AccountsError, match="had labels when the run started"):
            close_roster(label_set, "r", keys_to_sorted(ROWS.row_key))

    def test_stopped_while_it_closed(self, label_set: LabelSet) -> None:
        """The roster is there, half of the parts are gone: it is not made again from the rest."""
        commit(label_set, ROWS)
        write_part(label_set.store, "r", part(KEYS[:6]))
        write_part(label_set.store, "r", part(KEYS[6:], 6))
        accounts = close_roster(label_set, "r")
        write_part(label_set.store, "r", part(KEYS[6:], 6))
        assert close_roster(label_set, "r") == accounts
        assert read_accounts(label_set, "r") == accounts
        assert not label_set.store.exists("rosters/r.parts")

    def test_nothing_read(self, label_set: LabelSet) -> None:
        accounts = close_roster(label_set, "r")
        assert accounts.rows_read == 0
        assert len(build_view(f"{label_set.url}/../v", [(label_set, "r")]).table) == 0

    def test_refuses(self, label_set: LabelSet) -> None:
        with pytest.raises(RecordError, match="lacks place"):
            write_part(label_set.store, "r", part(KEYS).drop_columns(["place"]))
        with pytest.raises(StoreError, match="no roster of a finished run 'none'"):
            read_roster(label_set, "none")
        rel = write_part(label_set.store, "r", part(KEYS))
        label_set.store.write_bytes(rel, label_set.store.read_bytes(rel)[:-9])
        with pytest.raises(DamagedError, match="run the job again"):
            close_roster(label_set, "r")

    @pytest.mark.parametrize(
        "wrong", [{"rows_read": 9}, {"rows_labelled": 1}, {"reasons": {"a": 2}}]
    )
    def test_accounts_that_do_not_add_up(self, wrong: dict[str, object]) -> None:
        right = {"rows_read": 10, "rows_labelled": 2, "rows_reused": 3, "rows_duplicate": 4}
        rest = {"rows_quarantined": 1, "tokens": 5, "labels": 4, "reasons": {"a": 1}}
        Accounts.model_validate(right | rest).check()
        with pytest.raises(AccountsError):
            Accounts.model_validate(right | rest | wrong).check()


class TestView:
    @pytest.fixture(autouse=True)
    def _small_groups(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 2000)

    def view(self, label_set: LabelSet, keys: Sequence[bytes] = KEYS, url: str = "") -> View:
        for start in (0, 6):
            commit(label_set, ROWS.slice(start, start + 6))
        write_part(label_set.store, "r", part(keys))
        close_roster(label_set, "r")
        return build_view(url or f"{Path(label_set.url).parent}/view", [(label_set, "r")])

    def test_rows_lengths_and_places(self, label_set: LabelSet) -> None:
        view = self.view(label_set, [*KEYS[:10], KEYS[0]])
        assert (view.num_rows, len(view.table)) == (10, 10)
        assert view.num_tokens == int(ROWS.token_offsets[10])
        assert view.num_labels == int(ROWS.label_offsets[10])
        view.check_shards()
        got = view.label_sets[0].read_rows(view.table)
        assert [k.tobytes() for k in got.row_key] == view.table["row_key"].to_pylist()
        assert np.diff(got.token_offsets).tolist() == view.table["num_tokens"].to_pylist()
        places = view.table.select(["shard", "row_group", "row"]).to_pylist()
        shards_in_order = [place["shard"] for place in places]
        changes = sum(a != b for a, b in pairwise(shards_in_order))
        assert changes == 1
        for shard in set(shards_in_order):
            rows = [(p["row_group"], p["row"]) for p in places if p["shard"] == shard]
            assert rows == sorted(rows)

    def test_opens_equal_from_anywhere(
        self, label_set: LabelSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        view = self.view(label_set)
        moved = tmp_path / "elsewhere"
        moved.mkdir()
        for name in ("labels", "view"):
            shutil.move(tmp_path / name, moved / name)
        monkeypatch.chdir("/")
        again = View.open(str(moved / "view"))
        assert again.view_hash == view.view_hash
        assert again.table.equals(view.table)
        assert again.sources == view.sources
        again.check_shards()

    def test_hash_is_of_content_not_of_attempts(self, label_set: LabelSet, tmp_path: Path) -> None:
        other = LabelSet.create_or_open(str(tmp_path / "other"), label_set.spec)
        views = [self.view(label_set), self.view(other, url=str(tmp_path / "view2"))]
        assert views[0].view_hash == views[1].view_hash
        assert views[0].table["shard"].to_pylist() != views[1].table["shard"].to_pylist()
        fewer = LabelSet.create_or_open(str(tmp_path / "fewer"), label_set.spec)
        view = self.view(fewer, KEYS[:-1], url=str(tmp_path / "view3"))
        assert view.view_hash != views[0].view_hash

    def test_several_label_sets(self, label_set: LabelSet, tmp_path: Path) -> None:
        other = LabelSet.create_or_open(
            str(tmp_path / "other"), make_spec(RECORD, VOCAB, weights_digest="b")
        )
        rest = make_rows(5, RECORD, VOCAB, seed=9)
        rows = LabelRows.concat([ROWS.slice(3, 5), rest])
        commit(other, rows)
        write_part(other.store, "q", part([key.tobytes() for key in rows.row_key]))
        close_roster(other, "q")
        self.view(label_set)
        view = build_view(str(tmp_path / "both"), [(label_set, "r"), (other, "q")])
        assert view.table["label_set"].to_pylist() == [0] * 12 + [1] * 5
        assert [source.run for source in view.sources] == ["r", "q"]
        view.check_shards()

    def test_dropped_unit_fails_loudly(self, label_set: LabelSet) -> None:
        view = self.view(label_set)
        pinned = view.sources[0].shards[1]
        label_set.store.delete(pinned.shard)
        with pytest.raises(StoreError, match=f"unit {pinned.unit_key} was dropped") as caught:
            view.check_shards()
        assert not isinstance(caught.value, DamagedError)

    def test_short_shard_is_named_with_the_repair(self, label_set: LabelSet) -> None:
        view = self.view(label_set)
        pinned = view.sources[0].shards[0]
        path = Path(label_set.store.path(pinned.shard))
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(DamagedError, match=f"--unit {pinned.unit_key}") as caught:
            view.check_shards()
        assert str(path) in str(caught.value)

    def test_rows_without_labels_any_more(self, label_set: LabelSet, tmp_path: Path) -> None:
        self.view(label_set)
        label_set.store.delete(f"manifests/{label_set.manifests()[0].unit_key}.json")
        with pytest.raises(StoreError, match="6 rows of run r have lost their labels"):
            build_view(str(tmp_path / "again"), [(label_set, "r")])

    def test_files_that_do_not_agree(self, label_set: LabelSet, tmp_path: Path) -> None:
        view = self.view(label_set)
        store = Path(view.url)
        whole = (store / "view.parquet").read_bytes()
        other = LabelSet.create_or_open(str(tmp_path / "other"), label_set.spec)
        fewer = self.view(other, KEYS[:-1], url=str(tmp_path / "fewer"))
        shutil.copy(Path(fewer.url) / "view.parquet", store / "view.parquet")
        with pytest.raises(DamagedError, match=r"view\.json records"):
            View.open(view.url)
        (store / "view.parquet").write_bytes(whole[:-30])
        with pytest.raises(DamagedError, match=r"view\.parquet: cannot be read"):
            View.open(view.url)
        (store / "view.parquet").unlink()
        with pytest.raises(DamagedError, match="rebuild the view"):
            View.open(view.url)
        (store / "view.json").write_text("{")
        with pytest.raises(DamagedError, match=r"view\.json: not a valid view"):
            View.open(view.url)
        (store / "view.json").unlink()
        with pytest.raises(StoreError, match="no view there"):
            View.open(view.url)

    def test_label_set_made_anew_is_another(self, label_set: LabelSet) -> None:
        view = self.view(label_set)
        shutil.rmtree(label_set.store.root)
        LabelSet.create_or_open(label_set.url, make_spec(RecordSpec(kind="topk", k=4), VOCAB))
        with pytest.raises(StoreError, match="was built from a label set with fingerprint"):
            View.open(view.url)
