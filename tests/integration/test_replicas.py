"""Several replicas of a teacher, of which one is killed; what a job held is released at its end."""

import dataclasses
import functools
import io
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from labeler.config import LabelConfig
from labeler.corpus.listing import list_corpus
from labeler.corpus.piece_reader import KeySnapshot
from labeler.run.actors.setup import RunSetup
from labeler.run.job import open_label_set
from labeler.run.pipeline import run_pipeline
from labeler.run.ray_cluster.resources import Resources
from schemas.console.progress import Progress
from schemas.errors import TeacherError
from schemas.label_set.roster import close_roster

pytestmark = pytest.mark.usefixtures("ray_session")

NOTHING = np.empty(0, "S16")
FRESH = KeySnapshot(NOTHING, NOTHING, retry_quarantined=False)
ROWS = 60
CPUS = 2.0  # of the shared Ray


class CpuBundles(Resources):
    """As on a cluster whose nodes have fewer GPUs than a replica needs, but of CPUs."""

    def bundle(self) -> dict[str, float]:
        return {"CPU": 0.5}


RESOURCES = CpuBundles(0.5, 0.0, 0, 1.0, min_replicas=2, max_replicas=2, bundles=1)


def config(folder: Path, model: Path) -> LabelConfig:
    corpus = folder / "corpus.jsonl"
    lines = [json.dumps({"text": f"x{n} = {n * n}" * (1 + n % 5)}) + "\n" for n in range(ROWS)]
    corpus.write_text("".join(lines))
    return LabelConfig.model_validate(
        {
            "labels": str(folder / "labels"),
            "corpus": {"path": str(corpus), "format": "jsonl", "piece_bytes": 100},
            "text": {"max_tokens": 64, "overlap": 8},
            "teacher": {"backend": "transformers", "model": str(model)},
            "record": {"kind": "topk", "k": 2, "entropy": False},
            "gates": {"parity_rows": 0},
            "run": {"unit_tokens": 100, "unit_rows": 6},
        }
    )


def slow_teacher(broken: bool) -> Callable[..., Any]:
    """Makes teachers that take their time and leave their process id in a folder."""

    def make(folder: Path, *_: Any) -> Any:
        from typing import Any  # this function travels without its module

        from labeler.teachers.protocol import RowLabels

        class Slow:
            shareable = False

            def label(self, token_ids: list[np.ndarray], *_: Any) -> Any:
                (folder / f"pid-{os.getpid()}").touch()
                time.sleep(0.5)
                if broken:
                    raise KeyError("a bug")
                return [self._one(len(ids) - 1) for ids in token_ids]

            def _one(self, count: int) -> RowLabels:
                logprobs = np.full((count, 2), np.log(1 / 320), np.float32)
                return RowLabels(
                    entry_ids=np.tile(np.arange(2, dtype=np.int32), (count, 1)),
                    entry_logprobs=logprobs,
                    head_len=np.full(count, 2, np.int32),
                    tail_len=np.zeros(count, np.int32),
                    entry_counts=None,
                    tail_logmass=np.full(count, np.log(318 / 320), np.float32),
                    target_logprob=logprobs[:, 0],
                    target_rank=np.ones(count, np.int32),
                    entropy=None,
                    lse=None,
                )

            def provenance(self) -> dict[str, object]:
                return {}

            def close(self) -> None:
                pass

        return Slow()

    return make


def living_groups() -> list[dict[str, Any]]:
    groups = ray.util.placement_group_table().values()
    return [group for group in groups if group["state"] != "REMOVED"]


def kill_one_of_two(folder: Path, groups_seen: list[int]) -> None:
    """Waits until two replicas have labelled something, then kills one."""
    end = time.monotonic() + 60
    while len(found := list(folder.glob("pid-*"))) < 2:
        if time.monotonic() > end:
            return
        time.sleep(0.02)
    groups_seen.append(len(living_groups()))
    newest = max(found, key=lambda file: file.stat().st_mtime)  # it is in the middle of a unit
    os.kill(int(newest.name.removeprefix("pid-")), signal.SIGKILL)


def test_job_survives_the_kill_of_a_replica(tmp_path: Path, tiny_model_dir: Path) -> None:
    job = config(tmp_path, tiny_model_dir)
    label_set = open_label_set(job)
    setup = RunSetup(tmp_path.name, job, functools.partial(slow_teacher(broken=False), tmp_path))
    groups_seen: list[int] = []
    killer = threading.Thread(target=kill_one_of_two, args=(tmp_path, groups_seen))
    killer.start()
    lines = io.StringIO()
    run_pipeline(list_corpus(job.corpus), setup, FRESH, RESOURCES, Progress("label", stream=lines))
    killer.join()
    assert "a teacher process crashed and was restarted" in lines.getvalue()
    assert groups_seen == [2]
    assert len(list(tmp_path.glob("pid-*"))) >= 3  # the killed one was replaced
    accounts = close_roster(label_set, tmp_path.name, NOTHING)
    accounts.check()
    assert (accounts.rows_labelled, accounts.rows_quarantined) == (ROWS, 0)
    units = label_set.manifests()
    assert sum(unit.num_rows for unit in units) == ROWS
    assert max(unit.num_rows for unit in units) <= 6
    assert living_groups() == []


def test_job_says_that_it_waits_for_its_teachers(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = config(tmp_path, tiny_model_dir)
    open_label_set(job)
    setup = RunSetup(tmp_path.name, job, functools.partial(slow_teacher(broken=False), tmp_path))
    monkeypatch.setattr("labeler.run.ray_cluster.startup_notice.DELAY_S", 3.0)
    other = ray.util.placement_group([{"CPU": CPUS}])  # all that there are
    assert other.wait(60)
    lines = io.StringIO()
    end = threading.Thread(target=end_when_told_of, args=(other, lines))
    end.start()
    resources = dataclasses.replace(RESOURCES, bundles=0)
    run_pipeline(list_corpus(job.corpus), setup, FRESH, resources, Progress("label", stream=lines))
    end.join()
    said = [line for line in lines.getvalue().splitlines() if not line.startswith("label: ")]
    assert said[0] == (
        "waiting for 2 teachers of 0.5 CPU, 0 GPU: the cluster has 0 CPU, 0 GPU free; "
        "other jobs, or teachers that are still starting, use the rest"
    )
    assert re.fullmatch(r"a teacher started after \d+s", said[1])
    assert len(said) == 2


def end_when_told_of(group: Any, lines: io.StringIO) -> None:
    end = time.monotonic() + 60
    while "waiting" not in lines.getvalue() and time.monotonic() < end:
        time.sleep(0.1)
    ray.util.remove_placement_group(group)


@pytest.mark.parametrize("bundles", [0, 1])
def test_failed_job_releases_its_resources(
    bundles: int, tmp_path: Path, tiny_model_dir: Path
) -> None:
    """Whoever has its error in hand can run the next job, which needs the same CPUs."""
    job = config(tmp_path, tiny_model_dir)
    open_label_set(job)
    setup = RunSetup(tmp_path.name, job, functools.partial(slow_teacher(broken=True), tmp_path))
    resources = dataclasses.replace(RESOURCES, bundles=bundles)
    with pytest.raises((TeacherError, KeyError)) as caught:
        run_pipeline(
            list_corpus(job.corpus), setup, FRESH, resources, Progress("label", enabled=False)
        )
    assert living_groups() == []
    free, end = 0.0, time.monotonic() + 60
    while free < CPUS and time.monotonic() < end:
        time.sleep(0.1)
        free = ray.available_resources().get("CPU", 0.0)
    assert free == CPUS
    assert caught.value.__traceback__ is not None  # it was held all the while
