"""Labels from a real vLLM server, and a label job whose server goes away in the middle."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labeler.config import LabelConfig, TeacherConfig
from labeler.teachers.remote.teacher import RemoteTeacher
from labeler.teachers.transformers_teacher import TransformersTeacher
from schemas.errors import RowFailure, TeacherError
from schemas.label_set.label_set import LabelSet
from schemas.spec import GenerationSpec, RecordSpec
from tests.support.teacher_requests import config as teacher_config
from tests.support.teacher_requests import label, labelled, make_rows

K = 16
RECORD = RecordSpec(kind="topk", k=K, entropy=False)
KEY_NAME = "TUTELAGE_TESTS_KEY"


def teacher_table(url: str, model: Path, **fields: Any) -> dict[str, Any]:
    table = {"backend": "remote", "url": url, "model": str(model), "dtype": "float32"}
    return {**table, **fields}


@pytest.fixture
def remote_config(
    vllm_server: tuple[str, str], tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> TeacherConfig:
    url, key = vllm_server
    monkeypatch.setenv(KEY_NAME, key)
    fields = {"max_model_len": 512, "remote": {"api_key_env": KEY_NAME}}
    return TeacherConfig.model_validate(teacher_table(url, tiny_model_dir, **fields))


def test_remote_teacher_gives_the_labels_of_its_model(
    remote_config: TeacherConfig, tiny_model_dir: Path
) -> None:
    remote = RemoteTeacher(remote_config, RECORD)
    reference = TransformersTeacher(teacher_config(tiny_model_dir, "transformers"), RECORD)
    tokens, spans = make_rows()
    ours, theirs = label(remote, tokens, spans), label(reference, tokens, spans)
    for one, other in zip(map(labelled, ours), map(labelled, theirs), strict=True):
        for name in ("entry_logprobs", "target_logprob", "tail_logmass"):
            np.testing.assert_allclose(
                getattr(one, name), getattr(other, name), rtol=0, atol=1e-4, err_msg=name
            )
        assert (one.entry_ids != other.entry_ids).mean() < 0.01
        assert (one.target_rank != other.target_rank).mean() < 0.01
    long = np.zeros(512, np.int32)
    (refused,) = label(remote, [long], [np.array([1, 512])])
    assert isinstance(refused, RowFailure)
    remote.close()


def test_remote_teacher_samples_by_seed(remote_config: TeacherConfig) -> None:
    remote = RemoteTeacher(remote_config, RECORD)
    prompts = [np.arange(5, 9), np.arange(40, 60)]
    generation = GenerationSpec(n=2, max_tokens=12)
    first = remote.generate(prompts, generation, [[1, 2], [3, 4]])
    again = remote.generate(prompts[::-1], generation, [[3, 4], [1, 2]])[::-1]
    for samples, same in zip(first, again, strict=True):
        assert not isinstance(samples, RowFailure)
        assert not isinstance(same, RowFailure)
        assert [sample.tolist() for sample in samples] == [sample.tolist() for sample in same]
        assert all(0 < len(sample) <= 12 for sample in samples)
    greedy = generation.model_copy(update={"temperature": 0.0})
    (one, two) = remote.generate([prompts[0]], greedy, [[1, 2]])[0]
    assert one.tolist() == two.tolist()
    remote.close()


def test_remote_teacher_refuses_what_its_server_does_not_allow(
    remote_config: TeacherConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TeacherError, match=rf"--max-logprobs {K + 1} or more"):
        RemoteTeacher(remote_config, RecordSpec(kind="topk", k=K + 1, entropy=False))
    monkeypatch.setenv(KEY_NAME, "another key")
    with pytest.raises(TeacherError, match="does not accept the API key"):
        RemoteTeacher(remote_config, RECORD)


def job(folder: Path, teacher: dict[str, Any], k: int, parity_rows: int) -> LabelConfig:
    texts = [f"def f{i}(x):\n    return x + {i}\n" for i in range(24)]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return LabelConfig.model_validate(
        {
            "labels": str(folder / "labels"),
            "corpus": {"path": str(corpus), "format": "jsonl"},
            "text": {"max_tokens": 48, "overlap": 4},
            "teacher": teacher,
            "record": {"kind": "topk", "k": k, "entropy": False},
            "gates": {"parity_rows": parity_rows},
            "run": {"unit_rows": 2},
        }
    )


def test_remote_label_job_passes_the_parity_gate(
    tmp_path: Path, remote_config: TeacherConfig, tiny_model_dir: Path
) -> None:
    table = teacher_table(remote_config.url, tiny_model_dir, remote={"api_key_env": KEY_NAME})
    run = job(tmp_path, table, K, parity_rows=2)
    # A process and a Ray of its own, which get the key with the environment of this one.
    code = (
        "import sys; from labeler.config import LabelConfig;"
        "from labeler.run.job import run_label_job;"
        "print(run_label_job(LabelConfig.model_validate_json(sys.argv[1])).rows_labelled)"
    )
    command = [sys.executable, "-c", code, run.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.split()[-1:] == ["24"], done.stderr[-2000:]
    labels = LabelSet.open(run.labels)
    parity = json.loads(labels.store.read_bytes("parity.json"))
    assert parity["reference"].startswith("transformers")
    assert parity["mean_kl"] < 1e-6
    for manifest in labels.manifests():
        assert "declared, not measured" in manifest.provenance["weights"]
        assert manifest.provenance["served_model"] == "tiny"
    assert "a key of these tests" not in labels.store.read_bytes("label_set.json").decode()
