"""Stores: one URL, whole files only, and exactly one creator of a file."""

import pickle
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from schemas import storage
from schemas.errors import StoreError
from schemas.storage import Store


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "local":
        yield Store(str(tmp_path / "new" / "folder"))
    else:
        yield Store(f"memory://{uuid.uuid4().hex}")
        fsspec.filesystem("memory").store.clear()


def test_local_paths_and_file_urls_are_one(tmp_path: Path) -> None:
    plain, url = Store(str(tmp_path)), Store(f"file://{tmp_path}/")
    assert plain.is_local
    assert url.is_local
    assert plain.root == url.root == str(tmp_path)
    assert plain.path("a", "b") == f"{tmp_path}/a/b"


def test_relative_paths_are_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Store("here").root == str(tmp_path / "here")


def test_write_read_list_delete(store: Store) -> None:
    assert store.list("a") == []
    store.write_bytes("a/one.json", b"1")
    store.write_bytes("a/two.json", b"22")
    store.write_bytes("a/two.json", b"2")
    store.write_bytes("a/three.txt", b"333")
    assert store.list("a", ".json") == ["a/one.json", "a/two.json"]
    assert store.read_bytes("a/two.json") == b"2"
    assert store.size("a/three.txt") == 3
    with store.open("b/four.bin", "wb") as file:
        file.write(b"4444")
    store.sync("b/four.bin")
    with store.open("b/four.bin") as file:
        assert file.read() == b"4444"
    store.delete("a/one.json")
    store.delete("a/one.json")
    assert not store.exists("a/one.json")
    store.delete("a")
    assert store.list("a") == []


def test_what_is_not_there_is_named(store: Store) -> None:
    for read in (store.read_bytes, store.open, store.size):
        with pytest.raises(StoreError, match=r"nothing\.json: there is no such file"):
            read("nothing.json")


def test_exclusive_creation_keeps_the_first(store: Store) -> None:
    assert store.create_exclusive("m/x.json", b"first")
    assert not store.create_exclusive("m/x.json", b"second")
    assert store.read_bytes("m/x.json") == b"first"
    store.probe_exclusive()
    assert store.list("m") == ["m/x.json"]


def test_no_temporary_file_stays(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_bytes("x", b"1")
    store.create_exclusive("y", b"1")
    store.create_exclusive("y", b"2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y"]


def test_of_many_creators_one_wins(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for attempt in range(20):
        start = threading.Barrier(8)
        won: list[int] = []

        def create(number: int, rel: str = f"m/{attempt}", start: Any = start, won: Any = won):
            start.wait()
            if store.create_exclusive(rel, b"%d" % number * 1000):
                won.append(number)

        threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert store.read_bytes(f"m/{attempt}") == b"%d" % won[0] * 1000


def test_store_survives_pickling(store: Store) -> None:
    store.write_bytes("x", b"1")
    assert pickle.loads(pickle.dumps(store)).read_bytes("x") == b"1"


def test_lost_answer_of_a_conditional_request_is_read_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The request succeeded, its answer was lost, and the repeated one met the file."""
    store = Store(f"memory://{uuid.uuid4().hex}")
    pipe_file = store.fs.pipe_file

    def lose_the_answer(path: str, value: bytes, **options: Any) -> None:
        pipe_file(path, value, **options)
        raise FileExistsError(path)

    monkeypatch.setattr(store.fs, "pipe_file", lose_the_answer)
    assert store.create_exclusive("m", b"mine")
    assert not store.create_exclusive("m", b"theirs")

    def fail(path: str, value: bytes, **options: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(store.fs, "pipe_file", fail)
    with pytest.raises(StoreError, match=r"cannot be created .no route."):
        store.create_exclusive("n", b"mine")


def test_store_that_overwrites_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"memory://{uuid.uuid4().hex}")
    pipe_file = store.fs.pipe_file
    monkeypatch.setattr(store.fs, "pipe_file", lambda path, value, mode="": pipe_file(path, value))
    with pytest.raises(StoreError, match="does not honour conditional writes"):
        store.probe_exclusive()


def test_driver_without_conditional_writes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "EXCLUSIVE_PROTOCOLS", frozenset({"s3"}))
    with pytest.raises(StoreError, match="can be read from but not written to"):
        Store("memory://any").create_exclusive("x", b"")


def test_answer_lost_by_a_network_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = storage.os.link

    def link_and_fail(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(str(target))

    monkeypatch.setattr(storage.os, "link", link_and_fail)
    assert Store(str(tmp_path)).create_exclusive("x", b"1")


def test_file_system_without_hard_links_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(storage.os, "link", refuse)
    with pytest.raises(StoreError, match="need a file system with hard links"):
        Store(str(tmp_path)).create_exclusive("x", b"1")
    assert list(tmp_path.iterdir()) == []


def test_unknown_protocol_is_named() -> None:
    with pytest.raises(StoreError, match="no file system for this URL"):
        Store("nosuch://bucket/x")
