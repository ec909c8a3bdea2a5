"""Transient store failures are retried; a disk that stays full ends in one line."""

import errno
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from schemas.errors import StoreError
from schemas.storage.retry import RetryPolicy, is_transient, retry, retrying
from schemas.storage.store import Store
from tests.support import ROOT


class Flaky:
    """Fails so often, then works."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.calls = 0
        self._failures = failures
        self._error = error

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self._failures:
            raise self._error
        return self.calls


def test_is_transient_separates_passing_failures_from_permanent_ones() -> None:
    class ServerError(Exception):
        status = 503

    class ClientError(Exception):
        response = {"ResponseMetadata": {"HTTPStatusCode": 403}}  # noqa: RUF012

    wrapped = StoreError("x: cannot be written (no space)")
    wrapped.__cause__ = OSError(errno.ENOSPC, "no space")
    for error in (wrapped, ServerError(), TimeoutError(), ConnectionResetError()):
        assert is_transient(error), error
    for error in (StoreError("x"), ClientError(), PermissionError(1, ""), KeyError("status")):
        assert not is_transient(error), error


def test_retry_reports_each_pause_and_returns_the_result() -> None:
    action, said = Flaky(3, OSError(errno.ENOSPC, "No space left on device")), []
    with retrying(RetryPolicy(60.0, said.append)):
        assert retry(action, "labels/x") == 4
    assert len(said) == 3
    assert "labels/x: [Errno 28] No space left on device; retrying in" in said[0]


def test_retry_ends_after_its_timeout() -> None:
    action = Flaky(1000, OSError(errno.EIO, "I/O error"))
    start = time.monotonic()
    with (
        retrying(RetryPolicy(1.0, lambda _: None)),
        pytest.raises(StoreError, match=r"labels/x: .*I/O error; retried for 1s\. Committed"),
    ):
        retry(lambda: retry(action, "inner"), "labels/x")
    assert time.monotonic() - start < 5


def test_retry_raises_permanent_failures_at_once_and_needs_a_policy(tmp_path: Path) -> None:
    action = Flaky(1, PermissionError(13, "Permission denied"))
    with retrying(RetryPolicy(60.0)), pytest.raises(PermissionError):
        retry(action, "x")
    with pytest.raises(OSError, match="no space"):
        retry(Flaky(1, OSError(errno.ENOSPC, "no space")), "x")
    with retrying(RetryPolicy(60.0)), pytest.raises(StoreError, match="no such file"):
        Store(str(tmp_path)).read_bytes("nothing")


CHILD = """
import sys, threading
from pathlib import Path
from tests.support.label_rows import make_rows, make_spec
from schemas.errors import StoreError
from schemas.keys import unit_key
from schemas.label_set.label_set import LabelSet
from schemas.storage.retry import RetryPolicy, retrying
from schemas.spec import RecordSpec

spec = make_spec(RecordSpec(kind="topk", k=8), 60)
labels = LabelSet.create_or_open({folder!r} + "/labels", spec)
ballast = Path({folder!r}) / "ballast"

def fill():
    try:
        with open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError as error:
        assert error.errno == 28

def commit(seed):
    rows = make_rows(20, spec.record, 60, seed=seed)
    return labels.commit_unit(rows, [], {{}}, unit_key(rows.row_key))

commit(0)
fill()
said = []
threading.Timer(1.5, ballast.unlink).start()
with retrying(RetryPolicy(60.0, said.append)):
    commit(1)
assert len(said) > 1 and "No space left" in said[0], said
fill()
try:
    with retrying(RetryPolicy(1.0, said.append)):
        commit(2)
except StoreError as error:
    print(error)
ballast.unlink()
kept = sorted(path.name for path in (Path({folder!r}) / "labels/shards").iterdir())
named = sorted(manifest.shard.split("/")[1] for manifest in labels.manifests())
assert kept == named and len(named) == 2, (kept, named)
commit(2)
assert len(labels.index()) == 60
"""


def test_commit_waits_for_a_full_disk(tmp_path: Path) -> None:
    """A real one: a file system of one MiB, mounted for a process of its own."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare to mount a small file system with")
    child = CHILD.format(folder=str(tmp_path))
    mount = f'mount -t tmpfs -o size=1m none {tmp_path} && exec "$@"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a file system of their own")
    done = subprocess.run(
        [*command, sys.executable, "-c", child],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert "No space left on device" in line
    assert line.endswith("run the same command again to resume")
