"""The teachers against each other and against vLLM's own path. One engine for the whole module."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from labeler.label_head.position_labels import PositionLabels, label_logits
from labeler.teachers import transformers_teacher
from labeler.teachers.factory import make_teacher
from labeler.teachers.protocol import RowLabels, Teacher
from labeler.teachers.transformers_teacher import TransformersTeacher
from labeler.teachers.vllm import label_requests
from labeler.teachers.vllm.teacher import VllmTeacher, engine_request
from labeler.teachers.vllm.worker import runner_v1
from labeler.units.assemble import assemble_rows
from schemas.errors import RowFailure, TeacherError
from schemas.keys import content_key, row_key, stack_keys
from schemas.record import validate
from schemas.record.spans import span_targets
from schemas.record.uniforms import uniforms
from schemas.spec import GenerationSpec, RecordSpec
from tests.support.teacher_requests import (
    CONTEXT,
    RECORD,
    VOCAB_SIZE,
    assert_same,
    assert_same_draws,
    config,
    label,
    labelled,
    make_rows,
    serving,
    use_record,
)

FLAT = RecordSpec(kind="topk", k=RECORD.k, entropy=False)


@pytest.fixture(scope="module")
def vllm(tiny_model_dir: Path) -> Iterator[VllmTeacher]:
    teacher = VllmTeacher(config(tiny_model_dir), RECORD)
    yield teacher
    teacher.close()


@pytest.fixture(scope="module")
def reference(tiny_model_dir: Path) -> Iterator[TransformersTeacher]:
    teacher = TransformersTeacher(config(tiny_model_dir, "transformers"), RECORD)
    yield teacher
    teacher.close()


def test_vllm_agrees_with_transformers(vllm: Teacher, reference: Teacher) -> None:
    tokens, spans = make_rows()
    ours, theirs = label(vllm, tokens, spans), label(reference, tokens, spans)
    for row, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert labelled(one).num_labels == len(span_targets(spans[row]))
        assert labelled(one).entry_ids.dtype == np.int32
        assert labelled(one).entry_ids.shape == (labelled(one).num_labels, RECORD.k)
        assert_same(labelled(one), labelled(other), 1e-4)


def stock_labels(vllm: VllmTeacher, tokens: list[np.ndarray]) -> list[Any]:
    """vLLM's own flat log-probabilities, of requests that share their batch with labelled ones."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=1, prompt_logprobs=RECORD.k, flat_logprobs=True, detokenize=False
    )
    spans = np.array([1, 5], dtype=np.int32)
    mixed = []
    for ids in tokens:
        ours = label_requests.label_params(spans, np.zeros(16, np.uint8), 0.0)
        mixed.append(engine_request(ids, params))
        mixed.append(engine_request(tokens[2], ours, label_requests.keep_arrays))
    return [output.prompt_logprobs for output in vllm._engine.outputs(mixed)[::2]]


def test_vllm_agrees_with_its_own_path(vllm: VllmTeacher) -> None:
    tokens, spans = make_rows()
    ours = label(vllm, tokens, spans)
    rank_differences = []
    for row, flat in enumerate(stock_labels(vllm, tokens)):
        for j, target in enumerate(span_targets(spans[row])):
            # Column 0 is the token that stands there, then come the candidates.
            here = slice(flat.start_indices[target], flat.end_indices[target])
            labels = labelled(ours[row])
            assert flat.token_ids[here][0] == tokens[row][target]
            assert abs(flat.logprobs[here][0] - labels.target_logprob[j]) < 1e-5
            # Its ranks start at 1 for the most probable and count ties in.
            rank_differences.append(flat.ranks[here][0] - labels.target_rank[j])
            candidates = flat.logprobs[here][1 : RECORD.k + 1]
            np.testing.assert_allclose(labels.entry_logprobs[j], candidates, rtol=0, atol=1e-5)
    # Logits are not the same to the bit in another batch, so that neighbours may change places.
    assert np.abs(rank_differences).max() <= 1
    assert np.mean(np.array(rank_differences) != 0) < 0.02


def test_stock_logprobs_give_the_labels_of_the_head(
    vllm: VllmTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, spans = make_rows()
    with serving(vllm, FLAT):
        by_head = label(vllm, tokens, spans)
        assert vllm.provenance()["label_path"] == "head"
        with monkeypatch.context() as patch:
            refuse = Mock(side_effect=TeacherError("another vLLM"))
            patch.setattr(label_requests, "install", refuse)
            use_record(vllm, FLAT)
            flat = label(vllm, tokens, spans)
            assert vllm.provenance()["label_path"] == "flat"
            assert "another vLLM" in str(vllm.provenance()["announcement"])
            with pytest.raises(TeacherError, match="another vLLM"):
                use_record(vllm, RecordSpec())  # which only the head can give
        use_record(vllm, FLAT)
        assert vllm.provenance()["label_path"] == "head"
    for one, other in zip(map(labelled, by_head), map(labelled, flat), strict=True):
        for name in ("entry_logprobs", "target_logprob", "tail_logmass"):
            np.testing.assert_allclose(
                getattr(one, name), getattr(other, name), rtol=0, atol=1e-4, err_msg=name
            )
        assert (one.entry_ids != other.entry_ids).mean() < 0.01
        assert (one.target_rank != other.target_rank).mean() < 0.02


@pytest.mark.parametrize("name", ["vllm", "reference"])
def test_bad_requests_do_not_disturb_the_others(name: str, request: pytest.FixtureRequest) -> None:
    teacher: Teacher = request.getfixturevalue(name)
    good = np.arange(10)
    everything = np.array([1, 10])
    requests = [
        (good, everything),
        (np.zeros(0, dtype=np.int32), everything),
        (np.arange(CONTEXT) % 7, np.array([1, CONTEXT])),
        (np.array([1, 2, VOCAB_SIZE]), np.array([1, 3])),
        (np.array([1, -2, 3]), np.array([1, 3])),
        (good, np.array([0, 5])),
        (good, np.array([1, 11])),
        (good, np.array([3, 3])),
        (good, np.array([5, 7, 2, 3])),
        (good, np.zeros(0, dtype=np.int32)),
        (good, everything),
    ]
    results = label(teacher, [tokens for tokens, _ in requests], [spans for _, spans in requests])
    reasons = [result.reason for result in results if isinstance(result, RowFailure)]
    assert reasons == ["empty", "too_long", "unknown_token", "unknown_token", *["bad_spans"] * 5]
    assert_same(labelled(results[0]), labelled(results[-1]), 1e-5)
    assert "token 320 at index 2" in str(results[3])


def test_teacher_answers_no_requests_with_nothing(vllm: Teacher, reference: Teacher) -> None:
    assert label(vllm, [], []) == label(reference, [], []) == []
    assert vllm.generate([], GenerationSpec(), []) == []


def test_calls_from_several_threads_share_the_engine(
    vllm: VllmTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, spans = make_rows()
    alone = label(vllm, tokens, spans)
    engine, in_engine = vllm._llm.llm_engine, [0]
    usual = engine.step

    def step() -> Any:
        in_engine.append(engine.get_num_unfinished_requests())
        return usual()

    monkeypatch.setattr(engine, "step", step)
    generation = GenerationSpec(n=1, max_tokens=20)
    with ThreadPoolExecutor(5) as pool:
        responses = pool.submit(vllm.generate, [tokens[2]], generation, [[1]])
        together = list(pool.map(lambda _: label(vllm, tokens, spans), range(4)))
        assert len(responses.result()[0][0])
    assert max(in_engine) > 2 * len(tokens)
    for results in together:
        for one, other in zip(alone, results, strict=True):
            assert_same(labelled(one), labelled(other), 1e-4)


def test_reference_does_not_depend_on_its_chunks(
    reference: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, spans = make_rows()
    whole = label(reference, tokens, spans)
    monkeypatch.setattr(transformers_teacher, "_LOGIT_ELEMENTS", 50 * VOCAB_SIZE)
    monkeypatch.setattr(transformers_teacher, "_BATCH_TOKENS", 300)
    for one, other in zip(whole, label(reference, tokens, spans), strict=True):
        assert_same(labelled(one), labelled(other), 1e-4)


@pytest.mark.parametrize("name", ["vllm", "reference"])
def test_samples_follow_their_seeds(name: str, request: pytest.FixtureRequest) -> None:
    teacher: Teacher = request.getfixturevalue(name)
    prompts = [np.array([5, 6, 7]), np.array([100, 101])]
    generation = GenerationSpec(n=2, temperature=1.0, top_p=0.9, max_tokens=12)
    first = teacher.generate(prompts, generation, [[1, 2], [3, 4]])
    again = teacher.generate(prompts[::-1], generation, [[4, 3], [2, 1]])
    for row in range(2):
        for sample in range(2):
            tokens = first[row][sample]
            assert tokens.dtype == np.int32
            assert 1 <= len(tokens) <= 12
            np.testing.assert_array_equal(tokens, again[1 - row][1 - sample])
    assert first[0][0].tolist() != first[0][1].tolist()


def test_teachers_sample_the_same_where_nothing_is_left_to_chance(
    vllm: Teacher, reference: Teacher
) -> None:
    prompts = [np.array([5, 6, 7]), np.array([100]), np.arange(CONTEXT - 10)]
    greedy = GenerationSpec(n=2, temperature=0.0, max_tokens=10)
    ours, theirs = (t.generate(prompts, greedy, [[1, 2]] * 3) for t in (vllm, reference))
    assert ours[2] == theirs[2]
    assert isinstance(ours[2], RowFailure)
    assert ours[2].reason == "too_long"
    for row in range(2):
        for one, other in zip(ours[row], theirs[row], strict=True):
            np.testing.assert_array_equal(one, other)


def test_scored_responses_after_generation_in_one_engine(vllm: Teacher, reference: Teacher) -> None:
    """Generation fills the prefix cache; labels must not be read around it."""
    prompt = np.arange(200) % VOCAB_SIZE
    responses = vllm.generate([prompt], GenerationSpec(n=1, max_tokens=8), [[1]])
    row = np.concatenate([prompt, responses[0][0]])
    spans = np.array([150, len(row)])
    one, other = label(vllm, [row], [spans]), label(reference, [row], [spans])
    assert_same(labelled(one[0]), labelled(other[0]), 1e-4)


def test_teacher_refuses_untested_vllm_versions(
    vllm: VllmTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert vllm.provenance()["model_runner"] == "CPUModelRunner"
    monkeypatch.setattr(label_requests, "TESTED_VERSIONS", ("9.9.",))
    with pytest.raises(TeacherError, match=r"written against vLLM 9\.9\.\*"):
        label_requests.install(vllm._llm, RECORD)
    monkeypatch.undo()
    monkeypatch.setattr(runner_v1, "_STEP_PARAMETERS", ("hidden_states", "something_new"))
    with pytest.raises(TeacherError, match="_get_prompt_logprobs_dict takes"):
        label_requests.install(vllm._llm, RECORD)


def test_process_refuses_a_second_engine(vllm: Teacher, tiny_model_dir: Path) -> None:
    with pytest.raises(TeacherError, match="already runs a vLLM engine"):
        make_teacher(config(tiny_model_dir), RECORD)
    assert isinstance(label(vllm, [np.arange(5)], [np.array([1, 5])])[0], RowLabels)


DRAWN = [
    RecordSpec(kind="threshold", tau=1 / 16),
    RecordSpec(kind="threshold", tau=1 / 40, temperatures=(2.0,), draw_seed=5),
    RecordSpec(kind="sampled", draws=20),
    RecordSpec(kind="sampled", draws=9, temperatures=(2.0,)),
]


def all_labelled(teacher: Teacher, rows: tuple[list[np.ndarray], ...]) -> list[RowLabels]:
    return [labelled(result) for result in label(teacher, *rows)]


@pytest.mark.parametrize("record", DRAWN, ids=lambda r: f"{r.kind}-{r.drawn_at}")
def test_draws_do_not_depend_on_the_teacher_or_the_batch(
    vllm: Teacher, reference: Teacher, record: RecordSpec
) -> None:
    rows = make_rows()
    with serving(vllm, record), serving(reference, record):
        whole = all_labelled(vllm, rows)
        assert_same_draws(whole, all_labelled(reference, rows), 1e-4, 0.01)
        backwards = all_labelled(vllm, tuple(part[::-1] for part in rows))[::-1]
        assert_same_draws(whole, backwards, 1e-4, 0.01)
        alone = [all_labelled(vllm, ([row], [spans]))[0] for row, spans in zip(*rows, strict=True)]
        assert_same_draws(whole, alone, 1e-4, 0.01)
    stored = assemble_rows(
        stack_keys([row_key(*pair) for pair in zip(*rows, strict=True)]),
        stack_keys([content_key(*pair) for pair in zip(*rows, strict=True)]),
        *rows,
        whole,
        record,
    )
    validate(stored, record, VOCAB_SIZE)
    assert stored.tail_len is not None
    assert stored.tail_len.mean() > 3


def test_draws_are_by_the_random_numbers_of_the_row_key(
    vllm: Teacher, reference: Teacher, tiny_model_dir: Path
) -> None:
    """Against labels from the model's own logits, with the numbers that the record documents."""
    from transformers import AutoModelForCausalLM

    rows, record = make_rows(), DRAWN[3]
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    expected = []
    for tokens, spans in zip(*rows, strict=True):
        targets, ids = span_targets(spans), torch.from_numpy(tokens).long()
        with torch.inference_mode():
            logits = model(ids[None]).logits[0, targets - 1]
        numbers = uniforms(row_key(tokens, spans), targets, 9, 0)
        expected += kept_ids(label_logits(logits, ids[targets], record, numbers))
    for teacher in (vllm, reference):
        with serving(teacher, record):
            found = [ids for labels in all_labelled(teacher, rows) for ids in kept_ids(labels)]
        same = [mine == theirs for mine, theirs in zip(found, expected, strict=True)]
        assert np.mean(same) > 0.99  # a number at the edge of two ids may go either way


def kept_ids(labels: RowLabels | PositionLabels) -> list[list[int]]:
    """The ids of every position, in order."""
    ids, lengths = np.asarray(labels.entry_ids), np.asarray(labels.head_len + labels.tail_len)
    return [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]


def test_audits_of_both_teachers_agree(vllm: VllmTeacher, reference: TransformersTeacher) -> None:
    tokens, spans = make_rows()
    keys = stack_keys([row_key(*pair) for pair in zip(tokens, spans, strict=True)])
    records = [{"kind": "topk", "k": 5}, {"kind": "sampled", "draws": 9}, {"tau": 1 / 16}]
    for record in map(RecordSpec.model_validate, records):
        with serving(vllm, record), serving(reference, record):
            pairs = zip(
                *(t.label(tokens, spans, keys, 0.1) for t in (vllm, reference)), strict=True
            )
        num_audited = 0
        for one, other in ((labelled(a), labelled(b)) for a, b in pairs):
            mine, theirs = one.audit, other.audit
            if mine is None or theirs is None:
                assert mine is theirs
                continue
            num_audited += len(mine.labels)
            np.testing.assert_array_equal(mine.labels, theirs.labels)
            np.testing.assert_allclose(mine.tail, theirs.tail, rtol=0, atol=1e-3)
            # They are of the ids that each teacher keeps, and those the labels' own numbers.
            lengths = (one.head_len + one.tail_len)[mine.labels]
            used = np.arange(mine.logprobs.shape[1]) < lengths[:, None]
            own = one.entry_logprobs[mine.labels]
            np.testing.assert_allclose(mine.logprobs[used], own[used], rtol=0, atol=1e-4)
        assert num_audited > 50


def test_stock_logprobs_know_the_most_probable_ids(
    vllm: VllmTeacher, reference: TransformersTeacher
) -> None:
    """What the parity gate falls back on where no second implementation fits."""
    tokens, spans = make_rows()
    few = slice(2, 5)
    labels = [labelled(one) for one in label(vllm, tokens[few], spans[few])]
    ids = [one.entry_ids for one in labels]
    stock = vllm.stock_logprobs(tokens[few], spans[few], ids)
    dense = reference.logprobs(tokens[few], spans[few], ids)
    for mine, theirs in zip(stock, dense, strict=True):
        known = ~np.isnan(mine)
        assert known.mean() > 0.99  # 16 of 20 candidates; ties at the end may go either way
        np.testing.assert_allclose(mine[known], theirs[known], rtol=0, atol=1e-4)
