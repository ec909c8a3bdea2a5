"""Injects faults into a training run: for the fault suite and its short version.

The driver is a separate process on the test's Ray instance, so workers keep running for a while
after it is killed. A seed determines what is killed, and when.

A moment within a save lasts milliseconds. When it shows on disk, all ranks are stopped; if the
moment has not passed by then, they are killed, otherwise they continue until the next save.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray

from schemas.config import dump_toml
from schemas.errors import DamagedError
from tests.support import ROOT
from tests.support.processes import send, training_ranks
from tests.support.training_runs import losses
from trainer.config.train import TrainConfig
from trainer.run.launch import run_train_job
from trainer.run_folder import TrainSummary

PATIENCE_S = 300.0


@dataclass
class Fault:
    """One line of the table.

    Attributes:
        what: was killed or damaged.
        when: the step that the curve showed, and what lay on disk.
        chain: name of the run that it happened to.
    """

    what: str
    when: str
    chain: str


class Trial:
    """A run that is disturbed."""

    def __init__(self, name: str, config: TrainConfig, rng: random.Random) -> None:
        self.name, self.config, self.run = name, config, Path(config.run)
        self._rng = rng
        self._driver: subprocess.Popen[bytes] | None = None
        self._log = self.run.with_name(f"{self.run.name}.log").open("ab")
        self.faults: list[Fault] = []
        self._curve_then = 0

    def start(self, **ray_section: object) -> None:
        """Starts a driver, beside whatever is left of the one before."""
        if ray_section:
            changed = self.config.ray.model_copy(update=ray_section)
            self.config = self.config.model_copy(update={"ray": changed})
        path = self.run.with_name(f"{self.run.name}.toml")
        path.write_text(dump_toml(self.config))
        address = ray.get_runtime_context().gcs_address
        self._driver = subprocess.Popen(
            [sys.executable, "-m", "cluster", "train", str(path)],
            env={**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            stderr=self._log,
        )

    def fault(self, what: str, after_step: int) -> None:
        """Waits until the run is past a step, then does one thing to it.

        Args:
            what: name of a fault of ``FAULTS``.
            after_step: the fault comes a seeded number of steps and milliseconds later.
        """
        if self._driver is None:
            self.start()
        if self.faults:
            self.wait_until(lambda: self._curve() != self._curve_then)
        step = after_step + self._rng.randrange(3)
        self.wait_until(lambda: last_step(self.run) >= step)
        FAULTS[what](self)

    def finish(self) -> TrainSummary:
        """Runs to the end in this process, beside whatever is left of the last driver."""
        self.kill_driver()
        return run_train_job(self.config)

    def kill_driver(self) -> None:
        """The driver alone; its workers find out by themselves."""
        if self._driver is not None:
            send([self._driver.pid], signal.SIGKILL)
            self._driver.wait()
            self._driver = None

    @property
    def num_files(self) -> int:
        """Files of a checkpoint before its manifest: model, random states, ZeRO partitions."""
        ranks = self.config.ray.max_workers
        return {0: 1 + ranks, 1: 1 + 2 * ranks, 2: 1 + 2 * ranks, 3: 3 * ranks}[
            self.config.deepspeed.zero_stage
        ]

    def stop(self) -> None:
        """Kills the driver and its workers, which are stopped first lest they finish the run."""
        send(self.ranks(), signal.SIGSTOP)
        self.kill_driver()
        send(self.ranks(), signal.SIGKILL)

    def is_alive(self) -> bool:
        """Whether the driver is running."""
        return self._driver is not None and self._driver.poll() is None

    def said(self) -> str:
        """The output of all drivers."""
        return self._log_path().read_text()

    def pause(self) -> None:
        """Waits for a random fraction of about a step."""
        time.sleep(self._rng.random() * 0.1)

    def ranks(self) -> list[int]:
        """Live training processes of this run, perhaps including those of a killed driver."""
        return training_ranks()

    def choose(self, ranks: list[int]) -> int:
        """Picks one rank at random."""
        return self._rng.choice(sorted(ranks))

    def note(self, what: str, when: str) -> None:
        """Adds a line to the table."""
        self.faults.append(Fault(what, f"step {last_step(self.run)}, {when}", self.name))
        self._curve_then = self._curve()

    def _log_path(self) -> Path:
        return Path(self._log.name)

    def _curve(self) -> int:
        """Inode of the learning curve: a resumed run replaces the file.

        The driver also reports the resume, but up to a second later, half of a short run.
        """
        return (self.run / "metrics.jsonl").stat().st_ino

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Waits until a condition holds; fails if the driver dies."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"{self.run}: {self.said()}"
            assert self.is_alive(), self.said()
            time.sleep(0.005)


def _kill_rank(trial: Trial) -> None:
    trial.pause()
    send([trial.choose(_wait_for_ranks(trial))], signal.SIGKILL)
    trial.note("one rank", on_disk(trial.run))


def _kill_all_ranks(trial: Trial) -> None:
    trial.pause()
    send(_wait_for_ranks(trial), signal.SIGKILL)
    trial.note("all ranks", on_disk(trial.run))


def _kill_driver(trial: Trial) -> None:
    trial.pause()
    trial.kill_driver()
    trial.note("the driver", on_disk(trial.run))


def _kill_in_save(moment: Callable[[Trial, set[str]], bool], name: str) -> Callable[[Trial], None]:
    def kill(trial: Trial) -> None:
        before = {folder.name for folder in (trial.run / "checkpoints").iterdir()}
        deadline, looked = time.monotonic() + PATIENCE_S, 0.0
        while time.monotonic() < deadline and trial.is_alive():
            if time.monotonic() - looked > 0.5:  # Ray may have replaced them
                ranks, looked = trial.ranks(), time.monotonic()
            if not moment(trial, before):
                time.sleep(0.0002)
                continue
            send(ranks, signal.SIGSTOP)
            if moment(trial, before):
                when = on_disk(trial.run)
                send(ranks, signal.SIGKILL)
                trial.note(f"all ranks, {name}", when)
                return
            send(ranks, signal.SIGCONT)
            before |= {folder.name for folder in (trial.run / "checkpoints").iterdir()}
        raise AssertionError(f"no save was met {name}: {trial.said()}")

    return kill


def _cut_checkpoint(trial: Trial) -> None:
    trial.stop()
    newest = max(finished(trial.run), key=step_of)
    victim = max(newest.glob("*.pt"), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-100])
    trial.note(f"driver and ranks; {victim.name} cut short", on_disk(trial.run))
    trial.start()
    trial.wait_until(lambda: f"{newest.name} is skipped: {victim.name} has" in trial.said())


def _cut_shard(trial: Trial) -> None:
    trial.stop()
    shard = min(Path(trial.config.view).with_name("labels").joinpath("shards").iterdir())
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(DamagedError, match=shard.name):
        run_train_job(trial.config, progress=False)
    shard.write_bytes(content)  # as `labels drop` and labelling again would
    trial.note("driver and ranks; a label shard cut short, refused, repaired", on_disk(trial.run))


def _is_about_to_remove(trial: Trial, before: set[str]) -> bool:
    names = {folder.name for folder in finished(trial.run)}
    return len(names) > trial.config.checkpoint.keep and bool(names - before)


FAULTS: dict[str, Callable[[Trial], None]] = {
    "rank": _kill_rank,
    "all ranks": _kill_all_ranks,
    "driver": _kill_driver,
    "first file": _kill_in_save(
        lambda trial, before: any(
            0 < size < trial.num_files for size in unfinished(trial.run, before)
        ),
        "between the files of a save",
    ),
    "all files": _kill_in_save(
        lambda trial, before: trial.num_files in unfinished(trial.run, before),
        "between the files of a save and its manifest",
    ),
    "manifest": _kill_in_save(
        _is_about_to_remove,
        "between the manifest of a save and the removal of old ones",
    ),
    "checkpoint": _cut_checkpoint,
    "shard": _cut_shard,
}


def finished(run: Path) -> list[Path]:
    """Checkpoint folders with a manifest."""
    return [path.parent for path in (run / "checkpoints").glob("step_*/manifest.json")]


def unfinished(run: Path, before: Set[str] = frozenset()) -> list[int]:
    """Number of files of every checkpoint folder without a manifest that was not there before."""
    sizes = []
    for folder in (run / "checkpoints").glob("step_*"):
        if folder.name not in before:
            with contextlib.suppress(FileNotFoundError):
                names = os.listdir(folder)
                sizes += [] if "manifest.json" in names else [len(names)]
    return sizes


def on_disk(run: Path) -> str:
    """For the table."""
    steps = sorted(step_of(folder) for folder in finished(run))
    parts = unfinished(run)
    return f"saved {steps}" + (f", files of unfinished ones: {parts}" if parts else "")


def last_step(run: Path) -> int:
    """The last step that the learning curve shows; 0 before the first."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (FileNotFoundError, ValueError):
        return 0


def step_of(folder: Path) -> int:
    """Step of a checkpoint folder."""
    return int(folder.name.removeprefix("step_").partition("-")[0])


def samples(run: Path) -> list[list[str]]:
    """Row keys of every step; the steps must be all of them, each once."""
    lines = [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["rows"] for line in lines]


def loss_difference(run: Path, undisturbed: Path) -> float:
    """Largest difference of the losses, step by step, in nats per label."""
    pairs = zip(losses(run), losses(undisturbed), strict=True)
    return max(abs(found - expected) for found, expected in pairs)


def table(trials: list[Trial], undisturbed: Path) -> str:
    """What was done to the runs and what it cost, in Markdown."""
    lines = [
        "| run | killed or damaged | when | samples lost, doubled | loss difference |",
        "|---|---|---|---|---|",
    ]
    for trial in trials:
        if not (trial.run / "summary.json").exists():
            lines.append(f"| {trial.name} | did not finish | | | |")
            continue
        same = samples(trial.run) == samples(undisturbed)
        lost = "0, 0" if same else "NOT THE SAME"
        difference = loss_difference(trial.run, undisturbed)
        lines += [
            f"| {trial.name} | {fault.what} | {fault.when} | {lost} | {difference:.1e} |"
            for fault in trial.faults
        ]
    return "\n".join(lines) + "\n"


def _wait_for_ranks(trial: Trial) -> list[int]:
    deadline = time.monotonic() + PATIENCE_S
    while not (ranks := trial.ranks()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return ranks
