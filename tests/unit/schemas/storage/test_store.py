"""Stores: one URL, whole files only, and exactly one creator of a file."""

import pickle
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from schemas.errors import StoreError
from schemas.storage import store as store_module
from schemas.storage.retry import RetryPolicy, retrying
from schemas.storage.store import Store


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


def test_store_names_what_is_missing(store: Store) -> None:
    for read in (store.read_bytes, store.open, store.size):
        with pytest.raises(StoreError, match=r"nothing\.json: no such file"):
            read("nothing.json")


def test_exclusive_creation_keeps_the_first(store: Store) -> None:
    assert store.create_exclusive("m/x.json", b"first")
    assert not store.create_exclusive("m/x.json", b"second")
    assert store.read_bytes("m/x.json") == b"first"
    store.probe_exclusive()
    assert store.list("m") == ["m/x.json"]


def test_store_leaves_no_temporary_file(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_bytes("x", b"1")
    store.create_exclusive("y", b"1")
    store.create_exclusive("y", b"2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y"]


def test_store_lets_one_of_many_creators_win(tmp_path: Path) -> None:
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
    monkeypatch.setattr(store_module, "EXCLUSIVE_PROTOCOLS", frozenset({"s3"}))
    with pytest.raises(StoreError, match="can be read but not written"):
        Store("memory://any").create_exclusive("x", b"")


def test_answer_lost_by_a_network_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = store_module.os.link

    def link_and_fail(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(str(target))

    monkeypatch.setattr(store_module.os, "link", link_and_fail)
    assert Store(str(tmp_path)).create_exclusive("x", b"1")


def test_file_system_without_hard_links_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(store_module.os, "link", refuse)
    with pytest.raises(StoreError, match="need a file system with hard links"):
        Store(str(tmp_path)).create_exclusive("x", b"1")
    assert list(tmp_path.iterdir()) == []


def test_unknown_protocol_is_named() -> None:
    with pytest.raises(StoreError, match="no file system for this URL"):
        Store("nosuch://bucket/x")


class NoCredentialsError(Exception):
    """As botocore's: of the driver's own, and none that Python knows."""


CALLS: dict[str, tuple[str, Callable[[Store], object]]] = {
    "exists": ("exists", lambda store: store.exists("a/x")),
    "size": ("size", lambda store: store.size("a/x")),
    "read_bytes": ("cat_file", lambda store: store.read_bytes("a/x")),
    "write_bytes": ("pipe_file", lambda store: store.write_bytes("a/x", b"1")),
    "open": ("open", lambda store: store.open("a/x")),
    "walk": ("find", lambda store: store.walk("a/x")),
    "list": ("ls", lambda store: store.list("a/x")),
    "delete": ("find", lambda store: store.delete("a/x")),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("timeout_s", [0.0, 60.0])
def test_store_reports_a_driver_error_in_one_line(
    name: str, timeout_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store("memory://refused")
    called, call = CALLS[name]
    for error, told in (
        (
            NoCredentialsError("Unable to locate credentials\nat all"),
            "Unable to locate credentials",
        ),
        (PermissionError("Access Denied"), "Access Denied"),
        (PermissionError(), "PermissionError"),
    ):
        monkeypatch.setattr(store.fs, called, _failing(error))
        line = rf"^memory://refused/a/x: cannot be read or written \({told}\); check credentials"
        with retrying(RetryPolicy(timeout_s)), pytest.raises(StoreError, match=line) as caught:
            call(store)
        assert caught.value.__cause__ is error
    monkeypatch.setattr(store.fs, called, _failing(ConnectionError("lost")))
    with pytest.raises(StoreError, match=r"\(lost\); this may be temporary: run the same command"):
        call(store)
    for mistake in (TypeError("ours"), AssertionError("ours"), KeyError("ours")):
        monkeypatch.setattr(store.fs, called, _failing(mistake))
        with pytest.raises(type(mistake), match="ours"):
            call(store)


def _failing(error: Exception) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def test_store_wraps_a_driver_error_after_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token can expire between two blocks."""
    store = Store(f"memory://{uuid.uuid4().hex}")
    with store.open("x", "wb") as file:
        file.write(b"12345")
    with store.open("x") as file:
        assert (file.read(2), file.tell(), file.seek(1), file.read()) == (b"12", 2, 1, b"2345")
    for mode, name, call in (
        ("rb", "read", lambda file: file.read(1)),
        ("wb", "write", lambda file: file.write(b"1")),
        ("wb", "close", lambda file: file.close()),
    ):
        opened: Any = store.open("y" if mode == "wb" else "x", mode)
        monkeypatch.setattr(type(opened._file), name, _failing(PermissionError("ExpiredToken")))
        with pytest.raises(StoreError, match=r"memory://.*/[xy]: cannot be .*ExpiredToken"):
            call(opened)
        monkeypatch.undo()


def test_unreadable_local_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.open", _failing(PermissionError(13, "Permission denied")))
    with pytest.raises(StoreError, match=rf"^{tmp_path}/x: .*Permission denied.*permissions, then"):
        Store(str(tmp_path)).open("x")


def test_missing_driver_names_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)
    with pytest.raises(StoreError, match=r"pip install 'tutelage\[s3\]'"):
        Store("s3://bucket/labels")
