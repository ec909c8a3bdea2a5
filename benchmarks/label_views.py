"""Views of the demo teacher's labels, long enough to train from: for `loader` and `step`."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.demo_labels import TokenRows, label, teacher_config
from labeler.teacher_model.identity import load_tokenizer
from schemas.keys import unit_key
from schemas.label_set.label_set import LabelSet
from schemas.label_set.roster import close_roster, write_part
from schemas.record.rows import LabelRows
from schemas.spec import LabelSetSpec, RecordSpec, TeacherIdentity, TextSpec
from schemas.views.view import View, build_view

UNIT_LABELS = 200_000


def make_view(folder: Path, rows: TokenRows, record: RecordSpec, copies: int) -> View:
    """A view over a label set of these rows.

    Args:
        folder: where both are made.
        rows: labelled once by the demo's teacher.
        record: of the label set.
        copies: how often each row is written, each time under another key, so that there is enough
            to read.
    """
    assembled = rows.assembled(label(rows, record), record)
    label_set = _label_set(folder, record)
    rng = np.random.default_rng(0)
    copied = [
        replace(assembled, row_key=rng.integers(0, 256, assembled.row_key.shape, np.uint8))
        for _ in range(copies)
    ]
    per_unit = max(1, UNIT_LABELS // assembled.num_labels)
    for start in range(0, copies, per_unit):
        unit = LabelRows.concat(copied[start : start + per_unit])
        label_set.commit_unit(unit, [], {}, unit_key(unit.row_key))
    write_part(label_set.store, "run", _roster_part(copied))
    close_roster(label_set, "run")
    return build_view(str(folder / "view"), [(label_set, "run")])


def _label_set(folder: Path, record: RecordSpec) -> LabelSet:
    vocabulary = load_tokenizer(teacher_config()).get_vocab()
    spec = LabelSetSpec(
        record=record,
        teacher=TeacherIdentity(
            weights_digest="benchmark",
            tokenizer_digest="benchmark",
            vocab_size=1 + max(vocabulary.values()),
        ),
        text=TextSpec(max_tokens=512, overlap=64, add_bos=True, add_eos=True, split_long=True),
    )
    return LabelSet.create_or_open(str(folder / "labels"), spec, vocabulary)


def _roster_part(parts: list[LabelRows]) -> pa.Table:
    keys = [bytes(key) for part in parts for key in part.row_key]
    return pa.table(
        {
            "row_key": pa.array(keys, pa.binary(16)),
            "source": pa.array(["benchmark"] * len(keys)),
            "place": pa.array(np.arange(len(keys))),
            "window": pa.array(np.zeros(len(keys), np.int32)),
            "sample": pa.array(np.full(len(keys), -1, np.int32)),
        }
    )
