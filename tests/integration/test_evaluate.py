"""Students and teacher on a held-out view, against a naive computation of every number."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from schemas.errors import ConfigError, StoreError, StudentError, VocabularyError
from schemas.keys import content_key, row_key, stack_keys, unit_key
from schemas.label_set.label_set import LabelSet
from schemas.label_set.roster import close_roster, write_part
from schemas.record import LabelRows
from schemas.spec import LabelSetSpec, RecordSpec, TeacherIdentity, TextSpec
from schemas.views.view import build_view
from tests.support.tiny_model import make_model
from trainer.config.evaluate import EvaluateConfig
from trainer.evaluation.compare import format_table, run_evaluate
from trainer.student.build import load_model, load_tokenizer

LENGTHS = (40, 7, 23, 2, 31, 18, 40, 11)


def token_rows(seed: int = 0) -> LabelRows:
    """Rows of random tokens; each labelled but for its first token and, if long, a gap."""
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(0, 320, n).astype(np.int32) for n in LENGTHS]
    spans = [np.array([1, n] if n < 10 else [1, 4, 6, n], np.int32) for n in LENGTHS]
    return LabelRows(
        row_key=stack_keys([row_key(t, s) for t, s in zip(tokens, spans, strict=True)]),
        content_key=stack_keys([content_key(t, s) for t, s in zip(tokens, spans, strict=True)]),
        token_ids=np.concatenate(tokens),
        token_offsets=np.concatenate([[0], np.cumsum(LENGTHS)]),
        label_spans=np.concatenate(spans),
        span_offsets=np.concatenate([[0], np.cumsum([len(s) for s in spans])]),
    )


def make_view(folder: Path, rows: LabelRows, vocabulary: dict[str, int]) -> str:
    spec = LabelSetSpec(
        record=RecordSpec(kind="tokens"),
        teacher=TeacherIdentity(tokenizer_digest="t", vocab_size=320),
        text=TextSpec(max_tokens=64, overlap=0, add_bos=False, add_eos=False, split_long=True),
    )
    label_set = LabelSet.create_or_open(str(folder / "labels"), spec, vocabulary)
    label_set.commit_unit(rows, [], {}, unit_key(rows.row_key))
    count = len(rows)
    part = pa.table(
        {
            "row_key": pa.array([key.tobytes() for key in rows.row_key], pa.binary(16)),
            "source": ["held-out"] * count,
            "place": pa.array(range(count), pa.int64()),
            "window": pa.array([0] * count, pa.int32()),
            "sample": pa.array([-1] * count, pa.int32()),
        }
    )
    write_part(label_set.store, "run", part)
    close_roster(label_set, "run")
    build_view(str(folder / "view"), [(label_set, "run")])
    return str(folder / "view")


@pytest.fixture(scope="module")
def student_dir(tiny_model_dir, tmp_path_factory) -> Path:
    """Another model over the teacher's tokenizer, with eight padding ids."""
    folder = tmp_path_factory.mktemp("student")
    for file in tiny_model_dir.iterdir():
        if "token" in file.name or "template" in file.name:
            shutil.copy(file, folder)
    make_model(folder, vocab_size=328, seed=1)
    return folder


@pytest.fixture(scope="module")
def view(tiny_model_dir, tmp_path_factory) -> str:
    vocabulary = load_tokenizer(str(tiny_model_dir)).get_vocab()
    return make_view(tmp_path_factory.mktemp("heldout"), token_rows(), vocabulary)


def naive(rows: LabelRows, path: Path, teacher_path: Path) -> dict[str, float]:
    """Row by row, with the models' own logits."""
    model, teacher = (load_model(str(p), "float32").eval() for p in (path, teacher_path))
    ce, kl, agree, confidences, hits = [], [], [], [], []
    for row in range(len(rows)):
        one = rows.slice(row, row + 1)
        tokens = torch.from_numpy(one.token_ids.astype(np.int64))[None]
        with torch.no_grad():
            q = torch.log_softmax(model(tokens).logits[0], -1)
            p = torch.log_softmax(teacher(tokens).logits[0], -1)
            q_shared = torch.log_softmax(q[:, :320], -1)
        for start, end in one.label_spans.reshape(-1, 2):
            for t in range(start, end):
                token = int(tokens[0, t])
                ce.append(-float(q[t - 1, token]))
                kl.append(float((p[t - 1].exp() * (p[t - 1] - q_shared[t - 1])).sum()))
                agree.append(float(q[t - 1].argmax() == p[t - 1].argmax()))
                confidences.append(float(q[t - 1].exp().max()))
                hits.append(float(q[t - 1].argmax() == token))
    c, h = np.array(confidences), np.array(hits)
    bins = np.clip(np.ceil(c * 15), 1, 15)
    ece = sum(abs(c[bins == b].sum() - h[bins == b].sum()) for b in range(1, 16)) / len(c)
    return {
        "cross_entropy": float(np.mean(ce)),
        "perplexity": float(np.exp(np.mean(ce))),
        "kl_to_teacher": float(np.mean(kl)),
        "top1_agreement": float(np.mean(agree)),
        "top1_accuracy": float(np.mean(h)),
        "ece": float(ece),
    }


def config(view: str, teacher: Path, student: Path, **changes: object) -> EvaluateConfig:
    fields = {"view": view, "teacher": str(teacher), "students": {"small": str(student)}}
    return EvaluateConfig(**{**fields, "device": "cpu", **changes})


@pytest.mark.parametrize(("batch_tokens", "chunk_tokens"), [(1, 5), (100, 1000)])
def test_evaluate_equals_naive_metrics(
    view, tiny_model_dir, student_dir, batch_tokens, chunk_tokens, capsys
):
    wanted = config(
        view, tiny_model_dir, student_dir, batch_tokens=batch_tokens, chunk_tokens=chunk_tokens
    )
    summary = run_evaluate(wanted)
    printed = capsys.readouterr()
    assert list(summary.models) == ["teacher", "small"]
    for name, path in (("teacher", tiny_model_dir), ("small", student_dir)):
        found = summary.models[name].model_dump()
        for metric, value in naive(token_rows(), path, tiny_model_dir).items():
            assert found[metric] == pytest.approx(value, rel=1e-4, abs=1e-5), (name, metric)
        assert found["tokens_per_s"] > 0
    assert summary.models["teacher"].kl_to_teacher == 0.0
    assert summary.models["teacher"].top1_agreement == 1.0
    assert summary.models["small"].kl_to_teacher > 0.1
    model = load_model(str(student_dir), "float32")
    assert summary.models["small"].parameters == sum(p.numel() for p in model.parameters())
    rows = token_rows()
    assert (summary.rows, summary.tokens) == (len(rows), rows.num_tokens)
    assert summary.labels == rows.num_labels
    assert format_table(summary) in printed.out
    assert "KL to teacher" in printed.out
    done = f"evaluate: {len(rows)} of {len(rows)} rows, {rows.num_tokens} tokens | teacher "
    assert printed.err.splitlines()[-1].startswith(done)
    assert re.search(r"small [\d,]+ tokens/s", printed.err)
    assert json.loads(summary.model_dump_json())["models"]["small"]["ece"] >= 0


def test_evaluate_spreads_max_rows_over_the_view(view, tiny_model_dir, student_dir):
    summary = run_evaluate(config(view, tiny_model_dir, student_dir, max_rows=4), progress=False)
    assert summary.rows == 4
    assert summary.tokens < sum(LENGTHS)


def test_evaluate_refuses_another_tokenizer(view, tiny_model_dir, student_dir, tmp_path):
    shutil.copytree(student_dir, tmp_path / "other")
    tokenizer = tmp_path / "other" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    words = content["model"]["vocab"]
    first, second = list(words)[100:102]
    words[first], words[second] = words[second], words[first]
    tokenizer.write_text(json.dumps(content))
    with pytest.raises(VocabularyError, match=r"tokenizer of small .* differs .* 2 of 320"):
        run_evaluate(config(view, tiny_model_dir, tmp_path / "other"))


def test_evaluate_names_what_is_missing(view, tiny_model_dir, student_dir, tmp_path):
    with pytest.raises(StoreError, match="nothing"):
        run_evaluate(config(str(tmp_path / "nothing"), tiny_model_dir, student_dir))
    with pytest.raises(StudentError, match=r"no model at .*missing"):
        run_evaluate(config(view, tiny_model_dir, tmp_path / "missing"))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch sees no GPU"):
            run_evaluate(config(view, tiny_model_dir, student_dir, device="cuda"))


@pytest.mark.parametrize(
    ("students", "message"),
    [({}, "students is empty"), ({"teacher": "x"}, "reserved for the teacher")],
)
def test_config_refuses_unusable_student_names(students, message):
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(view="v", teacher="t", students=students)
