"""Which checkpoints are trusted and kept; a save that dies leaves none that should not be."""

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from schemas.errors import StudentError, TutelageError
from schemas.storage.store import Store
from tests.support.training_runs import make_config
from trainer.checkpoints import writer as checkpoint_writer
from trainer.checkpoints.restore import load_checkpoint
from trainer.checkpoints.store import (
    CheckpointManifest,
    find_checkpoint,
    list_checkpoints,
    local_checkpoint,
    read_manifest,
)
from trainer.checkpoints.train_progress import TrainProgress
from trainer.checkpoints.writer import CheckpointWriter
from trainer.data.row_order import LoaderState


@pytest.fixture(autouse=True)
def _one_rank(tmp_path: Path) -> Iterator[None]:
    rendezvous = tmp_path.with_name(f"{tmp_path.name}.rank")
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Engine:
    """The parts of a DeepSpeed engine that checkpoints touch, around one weight."""

    def __init__(self, value: float = 0.0) -> None:
        self.weight = torch.nn.Parameter(torch.tensor([value]))
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.1)
        self.checkpoint_engine: Any = None

    def zero_optimization_stage(self) -> int:
        return 0

    def save_checkpoint(self, root: str, tag: str, save_latest: bool) -> None:
        state = {"weight": self.weight, "again": [self.weight], "name": "x"}
        self.checkpoint_engine.save(state, str(Path(root) / tag / "weights.pt"))

    def load_checkpoint(self, root: str, tag: str, load_lr_scheduler_states: bool) -> None:
        self.weight.data = torch.load(Path(root) / tag / "weights.pt")["weight"]


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A run's folder where files can be hashed in place, and one where they are downloaded."""
    if request.param == "local":
        yield Store(str(tmp_path / "run"))
        return
    store = Store(f"memory://run-{tmp_path.name}")
    yield store
    store.delete("checkpoints")


def progress(step: int, loss: float | None = None) -> TrainProgress:
    return TrainProgress(
        step=step,
        loader=LoaderState(view_hash="v", seed=0, epoch=0, step=step),
        tokens=10 * step,
        labels=9 * step,
        final_loss=0.1 + step / 3,
        pending={"loss": 1 / 3},
        metrics={} if loss is None else {"loss": loss},
    )


def make_writer(store: Store, attempt: str = "aa", **checkpoint: Any) -> CheckpointWriter:
    config = make_config(Path("run"), "view", "tokenizer", checkpoint={"keep": 10, **checkpoint})
    return CheckpointWriter(store, attempt, config, lambda: None)


def save(store: Store, *steps: int, attempt: str = "aa", **checkpoint: Any) -> None:
    writer = make_writer(store, attempt, **checkpoint)
    for step in steps:
        writer.save(Engine(float(step)), progress(step), ["fingerprint"])
    writer.wait()


def find(store: Store, tmp_path: Path) -> tuple[Path | None, CheckpointManifest | None, list[str]]:
    return find_checkpoint(store, tmp_path / "cache", is_node_leader=True)


def names(store: Store) -> list[str]:
    return [name for _, name in list_checkpoints(store)]


def rewrite(store: Store, rel: str, content: bytes | None) -> None:
    store.delete(rel)
    if content is not None:
        store.write_bytes(rel, content)


def test_restore_brings_back_the_newest_exactly(store: Store, tmp_path: Path) -> None:
    save(store, 5, 10)
    torch.manual_seed(7)
    save(store, 15)
    expected = torch.rand(3)
    folder, manifest, skipped = find(store, tmp_path)
    assert folder is not None
    assert manifest is not None
    assert folder.name == "step_15-aa"
    assert not skipped
    assert manifest.progress == progress(15)
    engine = Engine()
    load_checkpoint(engine, folder, manifest, is_leader=True)
    assert engine.weight.item() == 15.0
    assert torch.equal(torch.rand(3), expected)


def test_save_writes_the_state_of_its_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, started, go_on = Store(str(tmp_path)), threading.Event(), threading.Event()
    write_state = checkpoint_writer.write_state

    def slow(*arguments: Any) -> Any:
        started.set()
        assert go_on.wait(10)
        return write_state(*arguments)

    monkeypatch.setattr(checkpoint_writer, "write_state", slow)
    engine, writer = Engine(1.0), make_writer(store)
    writer.save(engine, progress(5), [])
    assert started.wait(10)
    with torch.no_grad():
        engine.weight.add_(1.0)  # the training goes on
    writer.check()
    assert find(store, tmp_path)[0] is None
    go_on.set()
    writer.wait()
    saved = torch.load(tmp_path / "checkpoints" / "step_5-aa" / "weights.pt")
    assert saved["weight"].item() == 1.0
    assert saved["again"][0].data_ptr() == saved["weight"].data_ptr()
    assert writer.busy_s > 0


def test_failed_writer_stops_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    save(store, 5)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "write_state", full)
        writer = make_writer(store)
        writer.save(Engine(), progress(10), [])
        with pytest.raises(StudentError, match=r"step 10 could not be .*No space left"):
            until_raised(writer)
    folder, _, _ = find(store, tmp_path)
    assert folder is not None
    assert folder.name == "step_5-aa"


@pytest.mark.parametrize("rank_is_lost_in", ["gathered", "barrier"])
def test_lost_rank_is_no_store_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank_is_lost_in: str
) -> None:
    """Only what is no TutelageError makes the workers start again."""
    writer = make_writer(Store(str(tmp_path)))

    def lost(*_: Any) -> None:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:4242")

    owner = checkpoint_writer if rank_is_lost_in == "gathered" else dist
    monkeypatch.setattr(owner, rank_is_lost_in, lost)
    writer.save(Engine(), progress(5), [])
    with pytest.raises(RuntimeError, match="closed by peer") as raised:
        until_raised(writer)
    assert not isinstance(raised.value, TutelageError)


def until_raised(writer: CheckpointWriter) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        writer.check()
        time.sleep(0.01)


def test_former_owner_finishes_no_checkpoint(tmp_path: Path) -> None:
    store, calls = Store(str(tmp_path)), []

    def owner_changes() -> None:
        calls.append(1)
        if len(calls) == 2:  # after the files, before the manifest
            raise StudentError("started again")

    config = make_config(Path("run"), "view", "tokenizer")
    writer = CheckpointWriter(store, "aa", config, owner_changes)
    writer.save(Engine(), progress(5), [])
    with pytest.raises(StudentError, match="started again"):
        writer.wait()
    assert find(store, tmp_path)[0] is None


def test_writer_keeps_only_the_newest(store: Store) -> None:
    save(store, 5, 10, 15, keep=2)
    assert names(store) == ["step_15-aa", "step_10-aa"]


@pytest.mark.parametrize(("best_is", "kept"), [("lowest", 10), ("highest", 5)])
def test_writer_also_keeps_the_best(tmp_path: Path, best_is: str, kept: int) -> None:
    store = Store(str(tmp_path))
    writer = make_writer(store, keep=1, keep_best=1, best_is=best_is)
    for step, loss in [(5, 3.0), (10, 1.0), (15, 2.0), (20, None), (25, 1.5)]:
        writer.save(Engine(), progress(step, loss), [])
    writer.wait()
    assert names(store) == ["step_25-aa", f"step_{kept}-aa"]


def test_writer_deletes_a_skipped_checkpoint_once_replaced(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    save(store, 5, 10)
    rewrite(store, "checkpoints/step_10-aa/weights.pt", b"")
    (tmp_path / "checkpoints" / "step_15-aa").mkdir()  # never finished
    (tmp_path / "checkpoints" / "universal_step_4-aa").mkdir()
    save(store, 10, attempt="bb", keep=2)
    assert names(store) == ["step_10-bb", "step_5-aa"]
    assert not (tmp_path / "checkpoints" / "universal_step_4-aa").exists()


def test_find_returns_none_without_checkpoints(store: Store, tmp_path: Path) -> None:
    assert find(store, tmp_path) == (None, None, [])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda _: None, "missing"),
        (lambda content: content[:-1], "bytes, expected"),
        (lambda content: content[:-1] + b"!", "damaged"),
    ],
)
def test_find_skips_damage_and_says_so(
    store: Store, tmp_path: Path, damage: Any, reason: str
) -> None:
    save(store, 5, 10)
    rel = "checkpoints/step_10-aa/weights.pt"
    rewrite(store, rel, damage(store.read_bytes(rel)))
    folder, _, skipped = find(store, tmp_path)
    assert folder is not None
    assert folder.name == "step_5-aa"
    assert len(skipped) == 1
    assert reason in skipped[0]


def test_download_is_deleted_after_the_restore(tmp_path: Path) -> None:
    """Copies that are skipped at once, the one that is loaded after that, also if it fails."""
    store, cache = Store(f"memory://run-{tmp_path.name}"), tmp_path / "cache"
    save(store, 5, 10)
    rewrite(store, "checkpoints/step_10-aa/weights.pt", b"")
    with local_checkpoint(store, cache, is_node_leader=True) as (folder, _, skipped):
        assert folder == cache / "step_5-aa"
        assert len(skipped) == 1
        assert [path.name for path in cache.iterdir()] == ["step_5-aa"]
    assert not cache.exists()
    with (
        pytest.raises(RuntimeError, match="does not load"),
        local_checkpoint(store, cache, is_node_leader=True),
    ):
        raise RuntimeError("does not load")
    assert not cache.exists()
    rewrite(store, "checkpoints/step_5-aa/weights.pt", b"")
    with local_checkpoint(store, cache, is_node_leader=True) as (folder, _, _):
        assert folder is None
    assert not cache.exists()
    store.delete("checkpoints")


def test_find_skips_a_torn_manifest(store: Store, tmp_path: Path) -> None:
    save(store, 5, 10)
    rel = "checkpoints/step_10-aa/manifest.json"
    rewrite(store, rel, store.read_bytes(rel)[:50])
    folder, _, skipped = find(store, tmp_path)
    assert folder is not None
    assert folder.name == "step_5-aa"
    assert "unreadable" in skipped[0]


@pytest.mark.parametrize("dies_in", ["write_state", "gathered"])
def test_find_skips_a_save_that_died(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_in: str
) -> None:
    save(store, 5)
    die_after(store, monkeypatch, dies_in)
    folder, _, skipped = find(store, tmp_path)
    assert folder is not None
    assert folder.name == "step_5-aa"
    (line,) = skipped
    assert "step_10-aa is skipped: it is unfinished" in line
    save(store, 10, attempt="bb")  # what was left does not stand in the way
    folder, _, skipped = find(store, tmp_path)
    assert folder is not None
    assert folder.name == "step_10-bb"
    assert not skipped


def die_after(store: Store, monkeypatch: pytest.MonkeyPatch, dies_in: str) -> None:
    real = getattr(checkpoint_writer, dies_in)

    def die(*arguments: Any) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, dies_in, die)
        with pytest.raises(KeyboardInterrupt):
            save(store, 10)


@pytest.mark.parametrize("seed", [0, 1 << 24, 1 << 70])
def test_random_streams_restart_on_another_number_of_workers(tmp_path: Path, seed: int) -> None:
    store = Store(str(tmp_path))
    save(store, 5)
    folder, manifest, _ = find(store, tmp_path)
    assert folder is not None
    assert manifest is not None

    def draw(seed: int, step: int) -> list[float]:
        loader = LoaderState(view_hash="v", seed=seed, epoch=0, step=step)
        known = progress(step).model_copy(update={"loader": loader})
        saved = manifest.model_copy(update={"world_size": 4, "progress": known})
        load_checkpoint(Engine(), folder, saved, is_leader=True)
        return torch.rand(2).tolist()

    draws = []
    for number in (1, 2):
        torch.manual_seed(number)
        draws.append(draw(seed, 5))
    assert draws[0] == draws[1]
    assert draws[0] not in (draw(seed + 1, 5), draw(seed, 6))


def test_restore_takes_hyperparameters_from_the_configuration(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    save(store, 5)
    folder, manifest, _ = find(store, tmp_path)
    assert folder is not None
    assert manifest is not None
    engine = Engine()
    engine.optimizer.param_groups[0]["weight_decay"] = 0.25
    load_checkpoint(engine, folder, manifest, is_leader=True)
    assert engine.optimizer.param_groups[0]["weight_decay"] == 0.25


def test_find_accepts_folder_names_of_older_versions(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    save(store, 5)
    shutil.move(tmp_path / "checkpoints" / "step_5-aa", tmp_path / "checkpoints" / "step_5")
    assert find(store, tmp_path)[0] == tmp_path / "checkpoints" / "step_5"
    assert read_manifest(store, "step_5")[0] is not None
