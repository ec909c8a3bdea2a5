"""The fingerprint changes with what a label means, and with nothing else."""

from typing import Any

import pydantic
import pytest

from schemas.spec import GenerationSpec, LabelSetSpec, RecordSpec, TeacherIdentity
from tests.support.label_rows import make_spec

SPEC = make_spec(RecordSpec(kind="topk", logprob_bits=10), 320)


def changed(**fields: object) -> LabelSetSpec:
    return SPEC.model_copy(update=fields)


def test_fingerprint_is_frozen() -> None:
    """If this changes, every label set in the world has to be labelled again."""
    assert SPEC.fingerprint() == "c483b36505aeb46e028b25feb3d591e9"


@pytest.mark.parametrize(
    "other",
    [
        changed(schema_version=2),
        changed(record=RecordSpec(kind="topk", k=32)),
        changed(record=RecordSpec(temperatures=(2.0,))),
        changed(record=RecordSpec(entropy=False)),
        changed(record=RecordSpec(logprob_bits=7)),
        changed(teacher=SPEC.teacher.model_copy(update={"weights_digest": "x"})),
        changed(teacher=SPEC.teacher.model_copy(update={"head_dtype": "float32"})),
        changed(teacher=SPEC.teacher.model_copy(update={"quantization": "fp8"})),
        changed(text=SPEC.text.model_copy(update={"overlap": 1})),
        changed(generation=GenerationSpec()),
    ],
)
def test_fingerprint_changes_with_the_meaning(other: LabelSetSpec) -> None:
    assert other.fingerprint() != SPEC.fingerprint()
    assert SPEC.differences(other)
    copy = LabelSetSpec.model_validate_json(other.model_dump_json())
    assert copy.fingerprint() == other.fingerprint()


def test_asking_for_more_samples_keeps_the_label_set() -> None:
    few, many = (changed(generation=GenerationSpec(n=n)) for n in (1, 8))
    assert few.fingerprint() == many.fingerprint()


def test_tokens_have_no_teacher() -> None:
    a, b = (
        changed(
            record=RecordSpec(kind="tokens", entropy=entropy),
            teacher=TeacherIdentity(tokenizer_digest="t", vocab_size=9, dtype=dtype),
        )
        for entropy, dtype in ((False, ""), (True, "float32"))
    )
    assert a.fingerprint() == b.fingerprint()
    assert "head_len" not in a.record.columns
    with pytest.raises(pydantic.ValidationError, match="weights_digest is empty"):
        LabelSetSpec(
            record=RecordSpec(),
            teacher=TeacherIdentity(tokenizer_digest="t", vocab_size=9),
            text=SPEC.text,
        )


def test_differences_name_fields_and_both_values() -> None:
    other = changed(record=RecordSpec(kind="topk", k=32, logprob_bits=10))
    assert SPEC.differences(other) == ["record.k: 64 / 32"]


@pytest.mark.parametrize("temperatures", [(1.0,), (0.0,), (-2.0,), (2.0, 0.5), (2.0, 2.0)])
def test_temperatures_are_checked(temperatures: tuple[float, ...]) -> None:
    with pytest.raises(pydantic.ValidationError, match=r"record\.temperatures"):
        RecordSpec(temperatures=temperatures)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"kind": "threshold", "k": 12}, "record.k applies to kind topk only"),
        ({"kind": "topk", "tau": 0.1}, "record.tau applies to kind threshold only"),
        ({"kind": "topk", "draw_seed": 1}, "draw_seed applies to kind sampled and thresh"),
        (
            {"kind": "sampled", "draw_temperature": 2.0},
            r"expected 1 or one of .*temperatures, \[\]",
        ),
    ],
)
def test_fields_of_another_kind(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=expected):
        RecordSpec(**fields)


def test_draws_are_from_the_flattest_distribution_that_is_asked_for() -> None:
    assert RecordSpec(kind="threshold").drawn_at == 1.0
    assert RecordSpec(kind="threshold", temperatures=(0.5,)).drawn_at == 1.0
    flat = RecordSpec(kind="threshold", temperatures=(0.5, 2.0))
    assert flat.drawn_at == 2.0
    said = flat.model_copy(update={"draw_temperature": 2.0})
    assert changed(record=flat).fingerprint() == changed(record=said).fingerprint()
    sharp = flat.model_copy(update={"draw_temperature": 1.0})
    assert changed(record=flat).fingerprint() != changed(record=sharp).fingerprint()


def test_columns_of_draws() -> None:
    assert "entry_counts" in RecordSpec(kind="sampled").columns
    assert "entry_counts" not in RecordSpec(kind="threshold").columns
