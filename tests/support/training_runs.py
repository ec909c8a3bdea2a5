"""Views of random labels and small training configurations, for tests of the trainer."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from schemas.config import validated
from schemas.keys import unit_key
from schemas.label_set.label_set import LabelSet
from schemas.label_set.roster import close_roster, write_part
from schemas.record import LabelRows
from schemas.spec import RecordSpec
from schemas.views.view import View, build_view
from tests.support.label_rows import make_rows, make_spec
from trainer.config.train import TrainConfig

MAX_TOKENS = 48


def make_view(
    folder: Path,
    record: RecordSpec,
    vocabulary: dict[str, int],
    num_rows: int = 96,
    unit_rows: int = 24,
    seed: int = 0,
) -> View:
    """A view of a label set of random labels, committed unit by unit."""
    vocab_size = 1 + max(vocabulary.values())
    spec = make_spec(record, vocab_size)
    label_set = LabelSet.create_or_open(str(folder / "labels"), spec, vocabulary)
    rows = make_rows(num_rows, record, vocab_size, seed=seed, max_tokens=MAX_TOKENS)
    for start in range(0, num_rows, unit_rows):
        unit = rows.slice(start, start + unit_rows)
        label_set.commit_unit(unit, [], {}, unit_key(unit.row_key))
    write_part(label_set.store, "run", _roster_part(rows))
    close_roster(label_set, "run")
    return build_view(str(folder / "view"), [(label_set, "run")])


def make_config(run: Path, view: Any, tokenizer: str, **sections: dict[str, Any]) -> TrainConfig:
    """A run of twelve steps of a tiny Llama; ``sections`` change single values."""
    content: dict[str, dict[str, Any]] = {
        "student": {
            "config": {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "tie_word_embeddings": True,
            },
            "tokenizer": tokenizer,
        },
        "loss": {"kind": "ghost", "alpha": 0.7},
        "data": {"max_tokens": 64, "sequences_per_step": 4, "steps": 12},
        "optimizer": {"lr": 1e-2},
        "checkpoint": {"every_steps": 3},
        "log": {"every_steps": 1, "tensorboard": False},
    }
    for name, values in sections.items():
        content[name] = {**content.get(name, {}), **values}
    return validated({"run": str(run), "view": view, **content}, TrainConfig, "test")


def curve(run: Path, kind: str) -> list[dict[str, Any]]:
    """The points of a run's learning curve of one kind: "train" or "eval"."""
    points = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [point for point in points if point["kind"] == kind]


def losses(run: Path) -> list[float]:
    """The learning curve of a run, which must have one point for each step."""
    points = curve(run, "train")
    assert [point["step"] for point in points] == list(range(1, len(points) + 1))
    return [point["loss"] for point in points]


def make_world(folder: Path, record: RecordSpec) -> tuple[View, Path]:
    """A view with its labels beside it, and the tokenizer of its teacher and student."""
    from transformers import AutoTokenizer

    from tests.support.tiny_model import make_tokenizer

    tokenizer = folder / "tokenizer"
    make_tokenizer(tokenizer)
    vocabulary = AutoTokenizer.from_pretrained(tokenizer).get_vocab()
    return make_view(folder, record, vocabulary), tokenizer


def back_to_step(run: Path, to: Path, step: int) -> Path:
    """A copy of a finished run as it was when it had saved a step, with later lines in its logs."""
    shutil.copytree(run, to)
    for folder in (to / "checkpoints").iterdir():
        if not folder.name.startswith(f"step_{step}-"):
            shutil.rmtree(folder)
    (to / "summary.json").unlink()
    return to


def _roster_part(rows: LabelRows) -> pa.Table:
    size = len(rows)
    return pa.table(
        {
            "row_key": pa.array([bytes(key) for key in rows.row_key], pa.binary(16)),
            "source": pa.array(["corpus"] * size),
            "place": pa.array(np.arange(size)),
            "window": pa.array(np.zeros(size, np.int32)),
            "sample": pa.array(np.full(size, -1, np.int32)),
        }
    )
