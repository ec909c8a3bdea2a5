"""The label job killed at any point and run again, and rows that kill the teacher's process."""

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from labeler.config import GatesConfig, LabelConfig
from labeler.job import open_label_set, run_label_job
from labeler.pieces import FrozenKeys, PieceReader, PieceResult
from labeler.pipeline import RunSetup, run_pipeline
from labeler.progress import Progress
from labeler.resources import Resources
from labeler.sources import list_corpus
from labeler.text_rows import TextRows
from schemas.label_set import LabelSet
from schemas.roster import close_roster, read_roster

ROOT = Path(__file__).parents[2]
NOTHING = np.empty(0, "S16")
FRESH = FrozenKeys(NOTHING, NOTHING, retry_quarantined=False)


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


def expected_keys(job: LabelConfig) -> set[bytes]:
    """The keys of the corpus, read in this process and without Ray."""
    from labeler.identity import load_tokenizer
    from labeler.text_rows import text_spec

    tokenizer = load_tokenizer(job.teacher)
    text = text_spec(job.text, tokenizer, "text")
    reader = PieceReader(job.corpus, text, None, TextRows(tokenizer, job.corpus, text, 320))
    result = PieceResult()
    for piece in list_corpus(job.corpus):
        for _ in reader.requests(piece, FRESH, lambda keys: np.ones(len(keys), bool), result):
            pass
    return {row.row_key for row in result.roster}


def wait_for(
    condition: Callable[[], bool], process: subprocess.Popen[bytes], limit_s: float
) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < end, "the job took too long"
        time.sleep(0.02)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for a process and all that it started."""
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in tree:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(tree)
    process.wait()


def test_killed_and_run_again(tmp_path: Path, tiny_model_dir: Path, ray_session: None) -> None:
    write_corpus(tmp_path, [f"x{n} = {n * n}" for n in range(400)])
    job = config(tmp_path, tiny_model_dir, unit_rows=2)
    code = (
        "import json, sys; from labeler.config import LabelConfig; "
        "from labeler.job import run_label_job; "
        "run_label_job(LabelConfig.model_validate_json(sys.argv[1]), progress=False)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, job.model_dump_json()], cwd=ROOT, env=environment
    )
    manifests = tmp_path / "labels" / "manifests"
    try:
        wait_for(lambda: len(list(manifests.glob("*.json"))) >= 5, process, 150)
    finally:
        kill_tree(process)
    before = LabelSet.open(job.labels).committed_keys()
    assert 10 <= len(before) < 400

    summary = run_label_job(job, progress=False)
    assert summary.rows_read == 400
    assert summary.rows_reused == len(before)
    label_set = LabelSet.open(job.labels)
    keys = label_set.index().column("row_key").to_pylist()
    assert len(keys) == len(set(keys))
    assert set(keys) == expected_keys(job)
    assert sum(manifest.num_rows for manifest in label_set.manifests()) == 400


def deadly_teacher(poison: str) -> Callable[..., Any]:
    """Makes teachers whose process ends over a certain row, as a crash of an engine does."""

    def make(folder: Path, *_: Any) -> Any:
        from typing import Any  # this function travels without its module

        from labeler.teachers.base import RowLabels

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


def test_a_row_that_kills_the_process_is_quarantined_alone(
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
    setup = RunSetup("run", job, make)
    resources = Resources(actor_cpus=1.0, actor_gpus=0.0, actor_threads=0, task_cpus=1.0)
    run_pipeline(list_corpus(job.corpus), setup, FRESH, resources, Progress(enabled=False))
    accounts = close_roster(label_set, "run", NOTHING)
    assert (accounts.rows_labelled, accounts.rows_quarantined) == (23, 1)
    assert accounts.reasons == {"kills_engine": 1}
    roster = read_roster(label_set, "run")
    bad = roster.filter([reason != "" for reason in roster.column("reason").to_pylist()])
    assert bad.column("row_key").to_pylist() == label_set.quarantine().column("row_key").to_pylist()
    assert not (tmp_path / "labels" / "attempts" / "run").exists()


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
