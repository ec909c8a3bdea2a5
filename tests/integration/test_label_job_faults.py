"""The label job killed at any point and run again, and rows that kill the teacher's process."""

import functools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labeler.config import GatesConfig, LabelConfig
from labeler.corpus.listing import list_corpus
from labeler.corpus.piece_reader import KeySnapshot
from labeler.run.actors.setup import RunSetup
from labeler.run.job import open_label_set
from labeler.run.pipeline import run_pipeline
from labeler.run.ray_cluster.resources import Resources
from schemas.console.progress import Progress
from schemas.label_set.roster import close_roster, read_roster
from tests.support import ROOT
from tests.support.label_faults import TEACHER_POINTS, FaultRun

NOTHING = np.empty(0, "S16")
FRESH = KeySnapshot(NOTHING, NOTHING, retry_quarantined=False)


def config(folder: Path, model: Path, unit_rows: int) -> LabelConfig:
    return LabelConfig.model_validate(
        {
            "labels": str(folder / "labels"),
            "corpus": {
                "path": str(folder / "corpus.jsonl"),
                "format": "jsonl",
                "piece_bytes": 2000,
            },
            "text": {"max_tokens": 64, "overlap": 8},
            "teacher": {"backend": "transformers", "model": str(model)},
            "record": {"kind": "topk", "k": 4},
            "run": {"unit_rows": unit_rows},
        }
    )


def write_corpus(folder: Path, texts: list[str]) -> None:
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "corpus.jsonl").write_text("".join(lines))


def test_label_job_survives_kills_and_stops(tmp_path: Path) -> None:
    """What `make fault` does for minutes, once each; every job on a Ray of its own."""
    seed = int(os.environ.get("TUTELAGE_FAULT_SEED", "1"))
    run = FaultRun(tmp_path, seed, 200)
    with run.job() as job:
        run.kill_job(job)
    with run.job() as job:
        run.kill_at(run.rng.choice(TEACHER_POINTS), job, "teacher actor")
        run.stop_job(job, signal.SIGTERM)
    print(run.settle())
    assert [fault.lost for fault in run.table] == [0, 0, 0]
    assert [fault.doubled for fault in run.table] == [0, 0, 0]


def deadly_teacher(poison: str) -> Callable[..., Any]:
    """Makes teachers whose process ends over a certain row, as a crash of an engine does."""

    def make(folder: Path, *_: Any) -> Any:
        from typing import Any  # this function travels without its module

        from labeler.teachers.protocol import RowLabels

        class Deadly:
            shareable = False

            def label(self, token_ids: list[np.ndarray], *_: Any) -> Any:
                (folder / f"attempt-{time.monotonic_ns()}").touch()
                for ids in token_ids:
                    if poison in ids.tobytes().hex():
                        os._exit(11)
                return [self._one(len(ids) - 1) for ids in token_ids]

            def _one(self, count: int) -> RowLabels:
                logprobs = np.full((count, 4), np.log(1 / 320), np.float32)
                return RowLabels(
                    entry_ids=np.tile(np.arange(4, dtype=np.int32), (count, 1)),
                    entry_logprobs=logprobs,
                    head_len=np.full(count, 4, np.int32),
                    tail_len=np.zeros(count, np.int32),
                    entry_counts=None,
                    tail_logmass=np.full(count, np.log(316 / 320), np.float32),
                    target_logprob=logprobs[:, 0],
                    target_rank=np.ones(count, np.int32),
                    entropy=np.full(count, np.log(320), np.float32),
                    lse=None,
                )

            def provenance(self) -> dict[str, object]:
                return {}

            def close(self) -> None:
                pass

        return Deadly()

    return make


def test_row_that_kills_the_process_is_quarantined_alone(
    tmp_path: Path, tiny_model_dir: Path, ray_session: None
) -> None:
    from transformers import AutoTokenizer

    texts = [f"x{n} = {n * n}" for n in range(24)]
    write_corpus(tmp_path, texts)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    ids = tokenizer(texts[13])["input_ids"]
    poison = np.array([*ids, tokenizer.eos_token_id], np.int32).tobytes().hex()
    # These labels are made up, which the parity gate would rightly refuse.
    job = config(tmp_path, tiny_model_dir, unit_rows=4)
    job = job.model_copy(update={"gates": GatesConfig(parity_rows=0)})
    label_set = open_label_set(job)
    make = functools.partial(deadly_teacher(poison), tmp_path)
    setup = RunSetup(tmp_path.name, job, make)
    resources = Resources(actor_cpus=1.0, actor_gpus=0.0, actor_threads=0, task_cpus=1.0)
    run_pipeline(list_corpus(job.corpus), setup, FRESH, resources, Progress("label", enabled=False))
    accounts = close_roster(label_set, tmp_path.name, NOTHING)
    assert (accounts.rows_labelled, accounts.rows_quarantined) == (23, 1)
    assert accounts.reasons == {"kills_engine": 1}
    roster = read_roster(label_set, tmp_path.name)
    bad = roster.filter([reason != "" for reason in roster.column("reason").to_pylist()])
    assert bad.column("row_key").to_pylist() == label_set.quarantine().column("row_key").to_pylist()
    assert not (tmp_path / "labels" / "attempts" / tmp_path.name).exists()


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
