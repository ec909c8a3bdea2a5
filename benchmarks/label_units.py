"""Units of work as a label job has them, from rows to committed Parquet, without Ray."""

from collections.abc import Sequence

import numpy as np

from benchmarks.demo_labels import TokenRows
from labeler.config import GatesConfig
from labeler.corpus.requests import Request, sample_requests
from labeler.quality.gates import Gates
from labeler.run.unit_labeller import UnitLabeller
from labeler.supervision.attempts import Attempts
from labeler.supervision.supervisor import EngineSupervisor
from labeler.teachers.protocol import Teacher
from schemas.label_set.label_set import LabelSet
from schemas.spec import GenerationSpec, LabelSetSpec, RecordSpec, TeacherIdentity, TextSpec

_GATES = GatesConfig(parity_rows=0)
"""Audits as in any job; the second implementation is asked once a label set, not once a unit."""


def make_label_set(
    folder: str, record: RecordSpec, vocab_size: int, generation: GenerationSpec | None = None
) -> LabelSet:
    """An empty label set."""
    spec = LabelSetSpec(
        record=record,
        teacher=TeacherIdentity(
            weights_digest="benchmark", tokenizer_digest="benchmark", vocab_size=vocab_size
        ),
        text=TextSpec(max_tokens=4096, overlap=0, add_bos=False, add_eos=False, split_long=True),
        generation=generation,
    )
    return LabelSet.create_or_open(folder, spec)


def label_units(
    folder: str,
    teacher: Teacher,
    record: RecordSpec,
    vocab_size: int,
    generation: GenerationSpec | None,
) -> UnitLabeller:
    """What a teacher actor has, around a teacher that is there already."""
    label_set = make_label_set(folder, record, vocab_size, generation)
    attempts = Attempts(label_set.store, "benchmark")
    supervisor = EngineSupervisor(lambda: teacher, attempts, generation, _GATES.audit_rate)
    return UnitLabeller(label_set, supervisor, "", Gates(label_set, _GATES, lambda: None))


def make_requests(rows: TokenRows) -> list[Request]:
    """The requests for rows, as a tokenising task sends them."""
    triples = zip(rows.row_keys, rows.token_ids, rows.label_spans, strict=True)
    return [
        Request(key.tobytes(), tokens, spans, "benchmark", place)
        for place, (key, tokens, spans) in enumerate(triples)
    ]


def prompt_requests(prompts: Sequence[np.ndarray], generation: GenerationSpec) -> list[Request]:
    """The requests for all samples of all prompts, the samples of a prompt together."""
    requests: list[Request] = []
    for place, prompt in enumerate(prompts):
        requests += sample_requests(prompt, generation, "benchmark", place)
    return requests
