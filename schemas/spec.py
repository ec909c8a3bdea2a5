"""What makes a label mean what it means, and the fingerprint of it.

Identity only: parallelism, versions and hardware are provenance and live in the manifests. Two
label sets of equal fingerprint can be mixed; a run never adds to a set of another fingerprint.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from schemas.config import StrictModel

SCHEMA_VERSION = 1

TOKEN_COLUMNS = (
    "row_key",
    "content_key",
    "token_ids",
    "label_spans",
    "num_tokens",
    "num_labels",
)
TOPK_COLUMNS = (
    "head_len",
    "tail_len",
    "entry_ids",
    "entry_logprobs",
    "tail_logmass",
    "target_logprob",
    "target_rank",
)


class RecordSpec(StrictModel):
    """Which labels each position gets, and how precisely they are kept."""

    kind: Literal["tokens", "topk"] = Field(
        default="topk",
        description="tokens: no teacher, for hard labels; topk: the k most probable ids, exactly",
    )
    k: int = Field(default=64, ge=1, le=65535, description="entries of a topk head")
    temperatures: tuple[float, ...] = Field(
        default=(), description="distillation temperatures other than 1 for which lse is stored"
    )
    entropy: bool = Field(default=True, description="store the entropy of the full distribution")
    logprob_bits: int = Field(
        default=10, ge=1, le=10, description="mantissa bits of log-probabilities that are kept"
    )
    teacher_context: bool = Field(
        default=False, description="rows may have tokens that only the teacher saw"
    )

    @field_validator("temperatures")
    @classmethod
    def _check_temperatures(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        for temperature in value:
            if not 0.0 < temperature < float("inf") or temperature == 1.0:
                raise ValueError(
                    f"record.temperatures holds {temperature}; expected positive numbers other "
                    "than 1 (lse at 1 is 0 by definition)"
                )
        if list(value) != sorted(set(value)):
            raise ValueError(
                f"record.temperatures is {list(value)}; expected rising, each value once"
            )
        return value

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of a label set of this spec, in the order of the schema."""
        names = list(TOKEN_COLUMNS)
        if self.kind != "tokens":
            names.extend(TOPK_COLUMNS)
            if self.entropy:
                names.append("entropy")
            if self.temperatures:
                names.append("lse")
        if self.teacher_context:
            names.append("teacher_context")
        return tuple(names)


class TeacherIdentity(StrictModel):
    """What the teacher computes. Its name and path are provenance, so not here.

    Kind ``tokens`` has no teacher: only `tokenizer_digest` and `vocab_size` are used then.
    """

    weights_digest: str = ""
    config_digest: str = ""
    tokenizer_digest: str
    chat_template_digest: str = ""
    vocab_size: int = Field(ge=1, description="ids that the teacher gives probability to")
    dtype: str = ""
    head_dtype: str = ""
    quantization: str | None = None
    model_type: str = ""


class TextSpec(StrictModel):
    """How documents became token sequences."""

    max_tokens: int = Field(ge=2, description="the longest sequence, in tokens")
    overlap: int = Field(ge=0, description="tokens of context that a later window repeats")
    add_bos: bool
    add_eos: bool
    split_long: bool = Field(description="long documents are cut into windows; else quarantined")


class GenerationSpec(StrictModel):
    """How responses are sampled from the teacher before they are labelled."""

    n: int = Field(default=1, ge=1, description="responses for one prompt")
    temperature: float = Field(
        default=1.0, ge=0.0, description="generation temperature; 0: the most probable token"
    )
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    max_tokens: int = Field(default=256, ge=1, description="of one response")
    seed: int = Field(default=0, ge=0)


class LabelSetSpec(StrictModel):
    """The identity of a label set."""

    schema_version: int = SCHEMA_VERSION
    record: RecordSpec
    teacher: TeacherIdentity
    text: TextSpec
    generation: GenerationSpec | None = None

    @model_validator(mode="after")
    def _has_a_teacher(self) -> Self:
        if self.record.kind != "tokens" and not self.teacher.weights_digest:
            raise ValueError(
                f'teacher.weights_digest is empty, but record.kind "{self.record.kind}" is the '
                "output of a teacher, which its weights identify"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """The fields that the fingerprint covers, nested; only those that mean something here."""
        fields = self.model_dump(mode="json")
        if self.generation is not None:
            # Asking for more samples adds rows; it does not change those that are there.
            del fields["generation"]["n"]
        if self.record.kind == "tokens":
            fields["record"] = {
                name: fields["record"][name] for name in ("kind", "teacher_context")
            }
            fields["teacher"] = {
                name: fields["teacher"][name] for name in ("tokenizer_digest", "vocab_size")
            }
        return fields

    def fingerprint(self) -> str:
        """32 hexadecimal digits: SHA-256 of the identity as canonical JSON, cut."""
        canonical = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:32]

    def differences(self, other: "LabelSetSpec") -> list[str]:
        """One text ``field: mine / theirs`` for each field of the identity that differs."""
        mine, theirs = dict(_flat(self.identity())), dict(_flat(other.identity()))
        return [
            f"{name}: {mine.get(name)!r} / {theirs.get(name)!r}"
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
        ]


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
