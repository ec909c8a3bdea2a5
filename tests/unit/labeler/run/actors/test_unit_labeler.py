"""A unit of requests as one commit: labelled or quarantined, never twice."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from labeler.corpus.requests import Request, label_request, sample_requests
from labeler.corpus.windows import all_but_first
from labeler.run.actors.unit_labeler import UnitLabeler
from labeler.supervision.attempts import Attempts
from labeler.supervision.supervisor import EngineSupervisor
from labeler.teachers.protocol import OnRow, RowLabels, Teacher, ignore_row
from schemas.errors import RowFailure
from schemas.label_set.label_set import LabelSet
from schemas.spec import GenerationSpec, LabelSetSpec, RecordSpec, TeacherIdentity, TextSpec

VOCAB_SIZE = 50
BAD_TOKEN = 13
SILENT_TOKEN = 17
RECORD = RecordSpec(kind="topk", k=2, entropy=False)
GENERATION = GenerationSpec(n=3, max_tokens=4)


class UniformTeacher:
    """Gives every id the same probability, and refuses rows with a certain token."""

    shareable = False

    def __init__(self) -> None:
        self.num_labelled = 0
        self.row_keys: list[bytes] = []
        self.num_generated: list[int] = []

    def label(
        self,
        token_ids: Sequence[np.ndarray],
        label_spans: Sequence[np.ndarray],
        row_keys: np.ndarray,
        audit_rate: float = 0.0,
        on_row: OnRow = ignore_row,
    ) -> list[RowLabels | RowFailure]:
        self.row_keys += [key.tobytes() for key in row_keys]
        results = []
        for row, pair in enumerate(zip(token_ids, label_spans, strict=True)):
            results.append(self._one(*pair))
            on_row(row)
        return results

    def _one(self, ids: np.ndarray, spans: np.ndarray) -> RowLabels | RowFailure:
        if BAD_TOKEN in ids:
            return RowFailure("cursed", "it has the token")
        self.num_labelled += 1
        count = int((spans[1::2] - spans[::2]).sum())
        logprob = np.float32(-np.log(VOCAB_SIZE))
        return RowLabels(
            entry_ids=np.tile(np.arange(2, dtype=np.int32), (count, 1)),
            entry_logprobs=np.full((count, 2), logprob, np.float32),
            head_len=np.full(count, 2, np.int32),
            tail_len=np.zeros(count, np.int32),
            entry_counts=None,
            tail_logmass=np.full(count, np.log1p(-2 / VOCAB_SIZE), np.float32),
            target_logprob=np.full(count, logprob, np.float32),
            target_rank=np.ones(count, np.int32),
            entropy=None,
            lse=None,
        )

    def generate(
        self,
        prompt_ids: Sequence[np.ndarray],
        generation: GenerationSpec,
        seeds: Sequence[Sequence[int]],
        on_row: OnRow = ignore_row,
    ) -> list[list[np.ndarray] | RowFailure]:
        assert all(len(row) == generation.n for row in seeds)
        self.num_generated += [generation.n] * len(prompt_ids)
        for row, row_seeds in enumerate(seeds):
            for _ in row_seeds:
                on_row(row)
        results: list[list[np.ndarray] | RowFailure] = []
        for ids, row in zip(prompt_ids, seeds, strict=True):
            if BAD_TOKEN in ids:
                results.append(RowFailure("cursed", "it has the token"))
            elif SILENT_TOKEN in ids:
                results.append([np.empty(0, np.int32) for _ in row])
            else:
                results.append([np.array([seed % 10, 1], np.int32) for seed in row])
        return results

    def provenance(self) -> dict[str, object]:
        return {"teacher_backend": "uniform"}

    def close(self) -> None:
        """Nothing to free."""


@pytest.fixture
def teacher() -> UniformTeacher:
    return UniformTeacher()


def make_set(
    folder: Path, kind: str = "topk", generation: GenerationSpec | None = None
) -> LabelSet:
    spec = LabelSetSpec(
        record=RECORD if kind == "topk" else RecordSpec(kind="tokens"),
        teacher=TeacherIdentity(weights_digest="w", tokenizer_digest="t", vocab_size=VOCAB_SIZE),
        text=TextSpec(max_tokens=16, overlap=2, add_bos=False, add_eos=False, split_long=True),
        generation=generation,
    )
    return LabelSet.create_or_open(str(folder / "labels"), spec)


def labeller(
    labels: LabelSet,
    make: Callable[[], Teacher],
    generation: GenerationSpec | None = None,
    salt: str = "",
) -> UnitLabeler:
    return UnitLabeler(
        labels, EngineSupervisor(make, Attempts(labels.store, "run"), generation), salt
    )


def requests(*rows: list[int]) -> list[Request]:
    return [
        label_request(np.array(row, np.int32), all_but_first(len(row)), "a.jsonl", place, 0)
        for place, row in enumerate(rows)
    ]


def test_unit_labeler_labels_or_quarantines_each_request(
    tmp_path: Path, teacher: UniformTeacher
) -> None:
    labels = make_set(tmp_path)
    units = labeller(labels, lambda: teacher)
    batch = requests([1, 2, 3], [4, BAD_TOKEN], [5, 6])
    done = units.label(batch)
    assert (done.num_rows, done.num_labels, done.num_tokens, done.num_quarantined) == (2, 3, 5, 1)
    rows = labels.read_rows(labels.index())
    assert rows.token_ids.tolist() == [1, 2, 3, 5, 6]
    (bad,) = labels.quarantine().to_pylist()
    assert (bad["row_key"], bad["reason"], bad["place"]) == (batch[1].row_key, "cursed", 1)
    (manifest,) = labels.manifests()
    assert manifest.provenance["teacher_backend"] == "uniform"
    assert teacher.row_keys == [request.row_key for request in batch]


def test_unit_labeler_labels_a_unit_once(tmp_path: Path, teacher: UniformTeacher) -> None:
    labels = make_set(tmp_path)
    batch = requests([1, 2, 3], [5, 6])
    done = labeller(labels, lambda: teacher).label(batch)
    assert labeller(labels, lambda: teacher).label(batch[::-1]) == done
    assert teacher.num_labelled == 2
    assert len(labels.manifests()) == 1


def test_rows_and_responses_of_a_unit_in_work_are_reported(
    tmp_path: Path, teacher: UniformTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("labeler.units.unit_progress.REPORT_INTERVAL_S", 0.0)
    labels = make_set(tmp_path, generation=GENERATION)
    supervisor = EngineSupervisor(lambda: teacher, Attempts(labels.store, "run"), GENERATION)
    reports: list[tuple[object, ...]] = []
    units = UnitLabeler(labels, supervisor, report=lambda *counts: reports.append(counts))
    prompts = sample_requests(np.array([7, 8], np.int32), GENERATION, "a", 0)
    manifest = units.label(prompts)
    rows = [(0, 0, 1), (0, 0, 2), (0, 0, 3), (1, 4, 3), (2, 8, 3), (3, 12, 3)]
    assert reports == [(manifest.unit_key, *counts) for counts in rows]


def test_unit_labeler_makes_no_teacher_for_finished_units(
    tmp_path: Path, teacher: UniformTeacher
) -> None:
    labels = make_set(tmp_path)
    batch = requests([1, 2, 3])
    labeller(labels, lambda: teacher).label(batch)

    def refuse() -> UniformTeacher:
        raise AssertionError("a teacher was made")

    labeller(labels, refuse).label(batch)


def test_rows_of_a_quarantined_unit_can_be_tried_again(
    tmp_path: Path, teacher: UniformTeacher
) -> None:
    labels = make_set(tmp_path)
    batch = requests([4, BAD_TOKEN])
    labeller(labels, lambda: teacher).label(batch)
    assert len(labels.quarantined_keys()) == 1
    teacher._one = lambda ids, spans: UniformTeacher._one(  # type: ignore[method-assign]  # cured
        teacher, np.where(ids == BAD_TOKEN, 0, ids), spans
    )
    labeller(labels, lambda: teacher, salt="second run").label(batch)
    assert len(labels.quarantined_keys()) == 0
    assert len(labels.committed_keys()) == 1


def test_unit_labeler_needs_no_teacher_for_tokens(tmp_path: Path) -> None:
    labels = make_set(tmp_path, "tokens")
    done = UnitLabeler(labels, None).label(requests([1, 2, 3]))
    assert (done.num_rows, done.num_labels) == (1, 2)
    rows = labels.read_rows(labels.index())
    assert rows.head_len is None
    assert rows.label_spans.tolist() == [1, 3]


def test_responses_are_generated_and_labelled(tmp_path: Path, teacher: UniformTeacher) -> None:
    labels = make_set(tmp_path, generation=GENERATION)
    units = labeller(labels, lambda: teacher, GENERATION)
    first = sample_requests(np.array([7, 8], np.int32), GENERATION, "a", 0)
    second = sample_requests(np.array([9], np.int32), GENERATION, "a", 1)[1:]  # one was cached
    bad = sample_requests(np.array([BAD_TOKEN], np.int32), GENERATION, "a", 2)
    silent = sample_requests(np.array([SILENT_TOKEN], np.int32), GENERATION, "a", 3)
    done = units.label([*first, *second, *bad, *silent])
    assert (done.num_rows, done.num_quarantined) == (5, 6)
    assert sorted(teacher.num_generated) == [2, 3, 3, 3]
    # The key of how it was generated, not of what came of it, decides the draws of a response.
    assert set(teacher.row_keys) == {request.row_key for request in [*first, *second]}
    index = labels.index()
    rows = labels.read_rows(index)
    where = {key: number for number, key in enumerate(index.column("row_key").to_pylist())}
    for request in [*first, *second]:
        row = rows.slice(where[request.row_key], where[request.row_key] + 1)
        prompt = request.token_ids.tolist()
        assert row.token_ids.tolist() == [*prompt, request.seed() % 10, 1]
        assert row.label_spans.tolist() == [len(prompt), len(prompt) + 2]
    reasons = [row["reason"] for row in labels.quarantine().to_pylist()]
    assert sorted(reasons) == ["cursed"] * 3 + ["empty_response"] * 3
