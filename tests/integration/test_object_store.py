"""Label sets, rosters and views on s3://, over HTTP: commits of one winner, damage, two jobs."""

import importlib.util
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from cluster.__main__ import main
from schemas.errors import StoreError
from schemas.keys import unit_key
from schemas.label_set.label_set import LabelSet, QuarantineRow
from schemas.label_set.manifest import Manifest
from schemas.label_set.roster import close_roster, read_accounts, read_roster, write_part
from schemas.maintenance.garbage import collect_garbage
from schemas.maintenance.listing import list_label_sets
from schemas.maintenance.verify import verify
from schemas.spec import RecordSpec
from schemas.storage.retry import RetryPolicy, retrying
from schemas.storage.store import Store
from schemas.views.view import View, build_view
from tests.support import ROOT
from tests.support.label_rows import make_rows, make_spec
from tests.support.s3_server import S3Server

pytest.importorskip("s3fs", reason="pip install 'tutelage[s3]'")
if importlib.util.find_spec("moto") is None:  # not imported: see s3_server
    pytest.skip("pip install 'tutelage[dev]'", allow_module_level=True)

VOCAB = 60
SPEC = make_spec(RecordSpec(kind="topk", k=8), VOCAB)
RACERS = 16


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    server = S3Server()
    kept = {name: os.environ.get(name) for name in server.environment}
    os.environ.update(server.environment)
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("labels")
    yield server
    server.stop()
    for name, value in kept.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture
def url(server: S3Server) -> str:
    return f"s3://labels/{uuid.uuid4().hex}/set"


def commit(label_set: LabelSet, seed: int, **provenance: Any) -> Manifest:
    rows = make_rows(6, SPEC.record, VOCAB, seed=seed)
    bad = [QuarantineRow(bytes([seed] * 16), "a.jsonl", seed, 0, "bad_json", "{")]
    return label_set.commit_unit(rows, bad, provenance, unit_key(rows.row_key))


def test_store_waits_for_a_server_that_answers_503(url: str, server: S3Server) -> None:
    label_set = LabelSet.create_or_open(url, SPEC)
    label_set.store.fs.retries = 1  # those of the driver come on top of ours
    said: list[str] = []

    def tell(text: str) -> None:
        said.append(text)
        server.unavailable = len(said) < 2

    server.unavailable = True
    try:
        with retrying(RetryPolicy(60.0, tell)):
            commit(label_set, 2)
    finally:
        server.unavailable = False
    assert len(label_set.index()) == 6
    assert len(said) == 2
    assert "retrying in" in said[0]


def test_store_creates_a_file_once(url: str, server: S3Server) -> None:
    store = Store(url)
    before = server.writes
    store.probe_exclusive()
    assert server.writes == before + 2
    assert store.create_exclusive("manifests/a.json", b"first")
    assert not store.create_exclusive("manifests/a.json", b"second")
    assert store.read_bytes("manifests/a.json") == b"first"
    # A put that is repeated after a lost answer meets its own success.
    assert store.create_exclusive("manifests/a.json", b"first")


@pytest.mark.parametrize("round_", range(4))
def test_store_lets_one_of_many_threads_create(url: str, round_: int) -> None:
    def create(number: int) -> bool:
        return Store(url).create_exclusive(f"m/{round_}.json", f"writer {number}".encode())

    with ThreadPoolExecutor(RACERS) as pool:
        won = list(pool.map(create, range(RACERS)))
    assert sum(won) == 1
    assert Store(url).read_bytes(f"m/{round_}.json") == f"writer {won.index(True)}".encode()


RACE = """
import sys
from tests.support.label_rows import make_rows, make_spec
from schemas.keys import unit_key
from schemas.label_set.label_set import LabelSet
from schemas.spec import RecordSpec
spec = make_spec(RecordSpec(kind="topk", k=8), 60)
label_set = LabelSet.create_or_open(sys.argv[1], spec, {"a": 0})
print("ready", flush=True)
sys.stdin.readline()
for seed in range(5):
    rows = make_rows(6, spec.record, 60, seed=seed)
    print(label_set.commit_unit(rows, [], {}, unit_key(rows.row_key)).attempt)
"""


def test_commit_lets_one_of_many_processes_win(url: str, tmp_path: Path) -> None:
    script = tmp_path / "race.py"
    script.write_text(RACE)
    racers = [
        subprocess.Popen(
            [sys.executable, str(script), url],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    told = [racer.communicate(timeout=60)[0].split() for racer in racers]
    winners = {manifest.attempt for manifest in LabelSet.open(url).manifests()}
    assert len(winners) == 5
    assert all(sorted(attempts) == sorted(winners) for attempts in told)
    result = verify(url)
    assert result.problems == []
    losers = collect_garbage(url, 0.0, delete=True, now=datetime.now(UTC) + timedelta(hours=1))
    assert result.garbage == len([f for f in losers.files if f.file.startswith("shards/")])
    assert verify(url).problems == []


def test_label_set_rosters_and_views_work_on_s3(url: str, tmp_path: Path) -> None:
    label_set = LabelSet.create_or_open(url, SPEC, {"a": 0})
    first, second = commit(label_set, 1, model="teacher"), commit(label_set, 2)
    index = label_set.index()
    places = pa.array(range(len(index)), pa.int64())
    part = {
        "row_key": index.column("row_key"),
        "source": ["a.jsonl"] * len(index),
        "place": places,
        "window": pa.array([0] * len(index), pa.int32()),
        "sample": pa.array([-1] * len(index), pa.int32()),
    }
    write_part(label_set.store, "run", pa.table(part))
    assert close_roster(label_set, "run").rows_labelled == 12
    assert not label_set.store.list("rosters/run.parts")
    view = build_view(f"{url}-view", [(label_set, "run")])
    view.check_shards()
    assert View.open(f"{url}-view").num_rows == 12
    rows = view.label_sets[0].read_rows(view.table)
    expected = [make_rows(6, SPEC.record, VOCAB, seed=seed) for seed in (1, 2)]
    assert rows.num_labels == sum(part.num_labels for part in expected)
    np.testing.assert_array_equal(
        np.sort(rows.row_key.reshape(-1)),
        np.sort(np.concatenate([part.row_key.reshape(-1) for part in expected])),
    )
    out = tmp_path / "view.json"
    words = ["labels", "view", f"{url}-half", "--from", url, "--sample", "5", "--json", str(out)]
    assert main(words) == 0
    assert View.open(f"{url}-half").num_rows == 5
    (entry,) = list_label_sets(url.rsplit("/", 1)[0])
    assert (entry.url, entry.rows, entry.teacher) == (url, 12, "teacher")
    assert entry.bytes == first.size_bytes + second.size_bytes
    assert main(["labels", "show", url]) == 0
    assert main(["labels", "export", url, f"{url}-axolotl", "--format", "axolotl"]) == 0
    assert Store(f"{url}-axolotl").exists("data_00001.parquet")


def test_verify_drop_and_gc_work_on_s3(url: str) -> None:
    label_set = LabelSet.create_or_open(url, SPEC)
    kept, bad = commit(label_set, 1), commit(label_set, 2)
    store = label_set.store
    data = bytearray(store.read_bytes(bad.shard))
    data[len(data) // 2] ^= 1
    store.write_bytes(bad.shard, bytes(data))
    assert verify(url).units_to_drop == [bad.unit_key]
    store.delete(bad.shard)
    (problem,) = verify(url).problems
    assert (problem.what, problem.file) == ("missing", bad.shard)
    assert main(["labels", "drop", url, "--unit", bad.unit_key]) == 0
    assert commit(label_set, 2).attempt != bad.attempt
    assert verify(url).problems == []
    assert collect_garbage(url, 1.0).too_young == 2
    assert main(["labels", "gc", url, "--delete", "--older-than", "0"]) == 0
    assert not store.exists(bad.keys)
    assert store.exists(kept.keys)
    assert verify(url).units == 2


def test_store_refuses_servers_without_conditional_puts(
    url: str, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "ignores_conditions", True)
    with pytest.raises(StoreError, match="does not honour conditional writes"):
        LabelSet.create_or_open(url, SPEC)
    assert not Store(url).walk("")


# Two jobs, one label set

NUM_ROWS = 60


def write_job(tmp_path: Path, name: str, labels: str, model: Path, unit_rows: int) -> Path:
    config = tmp_path / f"{name}.toml"
    config.write_text(
        f'labels = "{labels}"\nview = "{labels}-{name}"\n'
        f'[corpus]\npath = "{tmp_path}/corpus.jsonl"\nformat = "jsonl"\npiece_bytes = 1500\n'
        "[text]\nmax_tokens = 64\noverlap = 8\n"
        f'[teacher]\nbackend = "transformers"\nmodel = "{model}"\n'
        '[record]\nkind = "topk"\nk = 8\n'
        f"[run]\nunit_rows = {unit_rows}\nnum_cpus = 2\n"
    )
    return config


@pytest.mark.parametrize("where", ["local", "s3"])
def test_concurrent_jobs_label_each_row_once(
    where: str, tmp_path: Path, tiny_model_dir: Path, server: S3Server
) -> None:
    texts = [f"def f{n}(x):\n" + "    x = x + 1\n" * (n % 5) for n in range(NUM_ROWS)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "corpus.jsonl").write_text(lines)
    labels = str(tmp_path / "labels") if where == "local" else f"s3://labels/{uuid.uuid4().hex}"
    # One cuts the corpus differently, so that rows are in units of both.
    jobs = [
        subprocess.Popen(
            [sys.executable, "-m", "cluster", "label", str(config), "--json", f"{config}.json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for config in (
            write_job(tmp_path, "one", labels, tiny_model_dir, 8),
            write_job(tmp_path, "two", labels, tiny_model_dir, 12),
        )
    ]
    said = [job.communicate(timeout=300)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], "\n".join(said)
    label_set = LabelSet.open(labels)
    index = label_set.index()
    keys = index.column("row_key").to_pylist()
    assert len(set(keys)) == len(keys) == len(index)
    summaries = [
        json.loads((tmp_path / f"{name}.toml.json").read_text()) for name in ("one", "two")
    ]
    for name, summary in zip(("one", "two"), summaries, strict=True):
        accounts = read_accounts(label_set, summary["run"])
        accounts.check()
        assert accounts.rows_quarantined == 0
        roster = read_roster(label_set, summary["run"])
        assert set(roster.column("row_key").to_pylist()) == set(keys)
        view = View.open(f"{labels}-{name}")
        view.check_shards()
        assert sorted(view.table.column("row_key").to_pylist()) == sorted(keys)
        assert view.label_sets[0].read_rows(view.table).num_labels == view.num_labels
    assert summaries[0]["rows_read"] == summaries[1]["rows_read"] >= NUM_ROWS
    written = sum(manifest.num_rows for manifest in label_set.manifests())
    print(f"{where}: {len(index)} rows for readers, {written} in committed units")
    assert len(index) <= written <= 2 * len(index)
    result = verify(labels)
    assert result.problems == []
