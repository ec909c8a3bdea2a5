"""Corpora of everything that should not be there: each row is labelled or in quarantine."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labeler.config import LabelConfig
from labeler.run.job import run_label_job
from labeler.run.summary import LabelSummary
from schemas.label_set.label_set import LabelSet
from schemas.label_set.roster import read_roster
from schemas.maintenance.verify import verify

pytestmark = pytest.mark.usefixtures("ray_session")

POISON = "\u00ff"
"""The model of these tests has a NaN for the embedding of this letter's first byte."""

NUM_TINY = 3000


@pytest.fixture(scope="module")
def poisoned_model(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose logits are NaN behind a certain token, and sound before it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("poisoned_model")
    shutil.copytree(tiny_model_dir, folder, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    (first, *_) = AutoTokenizer.from_pretrained(tiny_model_dir)(POISON)["input_ids"]
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.model.embed_tokens.weight[first] = float("nan")
    model.save_pretrained(folder)
    return folder


def run(folder: Path, model: Path, name: str, corpus: dict[str, Any]) -> LabelSummary:
    config = LabelConfig.model_validate(
        {
            "labels": str(folder / f"labels-{name}"),
            "corpus": {"path": str(folder / name), "piece_bytes": 200_000, **corpus},
            "text": {"max_tokens": 256, "overlap": 8},
            "teacher": {"backend": "transformers", "model": str(model)},
            "record": {"kind": "threshold", "tau": 0.05},
            "run": {"unit_rows": 512},
        }
    )
    summary = run_label_job(config, progress=False)
    parts = ("labelled", "reused", "duplicate", "quarantined")
    assert summary.rows_read == sum(getattr(summary, f"rows_{part}") for part in parts)
    assert not verify(summary.labels_url).problems
    return summary


def dispositions(summary: LabelSummary) -> dict[int, set[str]]:
    """By place, what became of the row's windows: dispositions, or reasons of the quarantine."""
    roster = read_roster(LabelSet.open(summary.labels_url), summary.run)
    found: dict[int, set[str]] = {}
    for row in roster.select(["place", "disposition", "reason"]).to_pylist():
        found.setdefault(row["place"], set()).add(row["reason"] or row["disposition"])
    return found


def test_bad_texts(tmp_path: Path, poisoned_model: Path) -> None:
    cases: list[tuple[bytes, set[str]]] = [
        (b'{"text": ""}', {"empty"}),
        (b'{"text": "a\\u0000b\\u0000"}', {"labelled"}),
        (b'{"text": "a\x00b"}', {"bad_json"}),
        (b'{"text": "\xff\xfe"}', {"invalid_utf8"}),
        (b'{"text": "\\ud800 alone"}', {"invalid_utf8"}),
        (b'{"text": 3}', {"wrong_type"}),
        (b'{"text": null}', {"wrong_type"}),
        (b'{"text": ["a"]}', {"wrong_type"}),
        (b'["text"]', {"wrong_type"}),
        (b'{"body": "a"}', {"missing_column"}),
        (b'{"text": "good"', {"bad_json"}),
        (b"\x00\x00\x00", {"bad_json"}),
        (b"[" * 100_000, {"bad_json"}),
        (json.dumps({"text": f"before {POISON} behind"}).encode(), {"not_finite"}),
        (b'{"text": "good"}', {"labelled"}),
        (b'{"text": "good"}', {"duplicate"}),
        (json.dumps({"text": "word " * 400}).encode(), {"labelled", "duplicate"}),
        # Ten megabytes in one row, without a space: thousands of windows, nearly all of them equal.
        (b'{"text": "%b"}' % (b"ab" * 5_000_000), {"labelled", "duplicate"}),
    ]
    lines = [line for line, _ in cases]
    lines += [json.dumps({"text": f"{n:x}"}).encode() for n in range(NUM_TINY)]
    (tmp_path / "texts").write_bytes(b"\n".join(lines) + b"\n")
    summary = run(tmp_path, poisoned_model, "texts", {"format": "jsonl"})
    found = dispositions(summary)
    place = 0
    for line, expected in cases:
        assert found[place] <= expected, (line[:60], found[place])
        place += len(line) + 1
    assert summary.rows_labelled > NUM_TINY


def test_bad_token_ids(tmp_path: Path, poisoned_model: Path) -> None:
    cases: list[tuple[Any, set[str]]] = [
        ([5, 6, 7], {"labelled"}),
        ([5, 6, 7], {"duplicate"}),
        ([], {"empty"}),
        ([5], {"nothing_to_label"}),
        ([5, 320], {"unknown_token"}),
        ([5, -1], {"unknown_token"}),
        ([5, 2**40], {"unknown_token"}),
        ([5, 2**70], {"wrong_type"}),
        ([5, "a"], {"wrong_type"}),
        ([5, 1.5], {"wrong_type"}),
        ("text", {"wrong_type"}),
        (None, {"wrong_type"}),
        ([5, 6, 7] * 100, {"labelled"}),
    ]
    rng = np.random.default_rng(0)
    good = [rng.integers(5, 250, 3).tolist() for _ in range(50)]
    rows = [*(ids for ids, _ in cases), *good]
    lines = [json.dumps({"token_ids": row}) for row in rows]
    (tmp_path / "ids").write_text("\n".join(lines) + "\n")
    summary = run(tmp_path, poisoned_model, "ids", {"format": "jsonl", "kind": "ids"})
    found = dispositions(summary)
    places = np.cumsum([0, *(len(line) + 1 for line in lines)]).tolist()
    for (ids, expected), place in zip(cases, places, strict=False):
        assert found[place] <= expected, (ids, found[place])
    assert all(len(found[place]) for place in places[: len(rows)])
