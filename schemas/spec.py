"""The settings that define what a label means, and their fingerprint.

Parallelism, versions and hardware are provenance and recorded in manifests. Label sets with equal
fingerprints can be mixed; a run never adds to a set with a different one.
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
LABEL_COLUMNS = (
    "head_len",
    "tail_len",
    "entry_ids",
    "entry_logprobs",
    "tail_logmass",
    "target_logprob",
    "target_rank",
)


RecordKind = Literal["tokens", "topk", "topp", "sampled", "threshold"]

# Fields that apply to some kinds of record only, in addition to the shared ones.
_KIND_FIELDS: dict[str, tuple[str, ...]] = {
    "tokens": (),
    "topk": ("k",),
    "topp": ("top_p", "max_head"),
    "sampled": ("draws", "draw_temperature", "draw_seed"),
    "threshold": ("tau", "draw_temperature", "draw_seed"),
}
_SHARED_FIELDS = ("kind", "temperatures", "entropy", "logprob_bits", "teacher_context")


class RecordSpec(StrictModel):
    """What is stored for each labelled position, and at what precision.

    Kinds, where p is the teacher's distribution:

    - ``threshold``: the most probable id and every id with p >= tau, exactly. The others are
      sampled systematically, in steps of tau along their cumulative sum. Each draw represents a
      probability of tau, which makes anything linear in p unbiased (Horvitz-Thompson).
    - ``sampled``: independent draws from p, with their counts (Random Sampling KD,
      arXiv 2503.16870). Also unbiased, but with higher variance.
    - ``topk``, ``topp``: an exact head and the mass outside it; biased unless the head is large.
    - ``tokens``: hard labels only, without a teacher.
    """

    kind: RecordKind = Field(
        default="threshold", description="how the teacher's distribution is stored"
    )
    k: int = Field(default=64, ge=1, le=65535, description="topk: ids stored per position")
    top_p: float = Field(
        default=0.98, gt=0.0, le=1.0, description="topp: probability mass that the stored ids cover"
    )
    max_head: int = Field(
        default=128, ge=1, le=65535, description="topp: maximum number of ids stored per position"
    )
    tau: float = Field(
        default=1 / 32,
        ge=1e-4,
        lt=1.0,
        description="threshold: ids with at least this probability are stored exactly",
    )
    draws: int = Field(default=32, ge=1, le=255, description="sampled: draws per position")
    draw_temperature: float | None = Field(
        default=None,
        gt=0.0,
        description="sampled, threshold: temperature T of the distribution that is drawn from and "
        "compared with tau, p^(1/T) normalised; unset: the largest of 1 and temperatures",
    )
    draw_seed: int = Field(
        default=0, ge=0, lt=2**64, description="sampled, threshold: random seed of the draws"
    )
    temperatures: tuple[float, ...] = Field(
        default=(),
        description="distillation temperatures, other than 1, to store lse for",
    )
    entropy: bool = Field(default=True, description="store the entropy of the full distribution")
    logprob_bits: int = Field(
        default=6,
        ge=1,
        le=10,
        description="mantissa bits kept of stored log-probabilities; lse keeps 10",
    )
    teacher_context: bool = Field(
        default=False, description="rows may include tokens that only the teacher sees"
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
                f"record.temperatures is {list(value)}; expected ascending, distinct values"
            )
        return value

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        own = _KIND_FIELDS[self.kind]
        for name in {name for names in _KIND_FIELDS.values() for name in names} - set(own):
            if getattr(self, name) != RecordSpec.model_fields[name].default:
                kinds = [kind for kind, names in _KIND_FIELDS.items() if name in names]
                raise ValueError(
                    f"record.{name} applies to kind {' and '.join(kinds)} only, but "
                    f'record.kind is "{self.kind}"; remove it'
                )
        served = (1.0, *self.temperatures)
        if self.draw_temperature is not None and self.draw_temperature not in served:
            raise ValueError(
                f"record.draw_temperature is {self.draw_temperature}; expected 1 or one of "
                f"record.temperatures, {list(self.temperatures)}"
            )
        return self

    @property
    def has_draws(self) -> bool:
        """Whether labels include tail draws, which make them unbiased."""
        return self.kind in ("sampled", "threshold")

    def needs_beyond_topk(self) -> list[str]:
        """Settings that need more than the top-k ids of each position; empty if none does."""
        kind = [] if self.kind == "topk" else [f'kind "{self.kind}"']
        return kind + [name for name in ("entropy", "temperatures") if getattr(self, name)]

    @property
    def drawn_at(self) -> float:
        """Temperature of the distribution that tail draws are sampled from."""
        if self.draw_temperature is not None:
            return self.draw_temperature
        return max((1.0, *self.temperatures))

    def most_entries(self, vocab_size: int) -> int:
        """Maximum number of entries per position."""
        most = {
            "tokens": 0,
            "topk": self.k,
            "topp": self.max_head,
            "sampled": self.draws,
            # Head entries have a probability of at least tau, except perhaps a head's first.
            "threshold": int(1 / self.tau) + 2,
        }
        return min(most[self.kind], vocab_size)

    @property
    def draw_share(self) -> float:
        """Probability that one draw represents, at the draw temperature; 0 without draws."""
        if self.kind == "threshold":
            return self.tau
        return 1.0 / self.draws if self.kind == "sampled" else 0.0

    @property
    def columns(self) -> tuple[str, ...]:
        """Column names of a label set with this record, in schema order."""
        names = list(TOKEN_COLUMNS)
        if self.kind != "tokens":
            names.extend(LABEL_COLUMNS)
            if self.kind == "sampled":
                names.insert(names.index("tail_logmass"), "entry_counts")
            if self.entropy:
                names.append("entropy")
            if self.temperatures:
                names.append("lse")
        if self.teacher_context:
            names.append("teacher_context")
        return tuple(names)

    def identity(self) -> dict[str, Any]:
        """The fields that apply to this kind, with the draw temperature resolved."""
        if self.kind == "tokens":
            return self.model_dump(mode="json", include={"kind", "teacher_context"})
        own = _KIND_FIELDS[self.kind]
        fields = self.model_dump(mode="json", include={*_SHARED_FIELDS, *own})
        if self.has_draws:
            fields["draw_temperature"] = self.drawn_at
        return fields


class TeacherIdentity(StrictModel):
    """Everything that determines the teacher's output; its name and path are provenance.

    Kind ``tokens`` has no teacher and uses only `tokenizer_digest` and `vocab_size`.
    """

    weights_digest: str = ""
    config_digest: str = ""
    tokenizer_digest: str
    chat_template_digest: str = ""
    vocab_size: int = Field(
        ge=1, description="number of ids that the teacher assigns probability to"
    )
    dtype: str = ""
    head_dtype: str = ""
    quantization: str | None = None
    model_type: str = ""


class TextSpec(StrictModel):
    """How documents become token sequences."""

    max_tokens: int = Field(ge=2, description="maximum sequence length, in tokens")
    overlap: int = Field(
        ge=0, description="tokens that each window repeats from the one before, as context"
    )
    add_bos: bool
    add_eos: bool
    split_long: bool = Field(
        description="split long documents into windows; otherwise quarantine them"
    )


class GenerationSpec(StrictModel):
    """How responses are sampled from the teacher before they are labelled."""

    n: int = Field(default=1, ge=1, description="responses per prompt")
    temperature: float = Field(default=1.0, ge=0.0, description="generation temperature; 0: greedy")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, description="nucleus sampling; 1: all tokens")
    max_tokens: int = Field(
        default=256, ge=1, description="maximum length of a response, in tokens"
    )
    seed: int = Field(default=0, ge=0, description="random seed of the sampling")


class LabelSetSpec(StrictModel):
    """Identity of a label set."""

    schema_version: int = SCHEMA_VERSION
    record: RecordSpec
    teacher: TeacherIdentity
    text: TextSpec
    generation: GenerationSpec | None = None

    @model_validator(mode="after")
    def _check_teacher(self) -> Self:
        if self.record.kind != "tokens" and not self.teacher.weights_digest:
            raise ValueError(
                f'teacher.weights_digest is empty, but labels of record.kind "{self.record.kind}" '
                "are identified by the teacher's weights"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """The fields that the fingerprint covers, nested; fields that do not apply are omitted."""
        fields = self.model_dump(mode="json")
        if self.generation is not None:
            # Requesting more samples adds rows but changes no existing row.
            del fields["generation"]["n"]
        fields["record"] = self.record.identity()
        if self.record.kind == "tokens":
            fields["teacher"] = {
                name: fields["teacher"][name] for name in ("tokenizer_digest", "vocab_size")
            }
        return fields

    def fingerprint(self) -> str:
        """32 hexadecimal digits: SHA-256 of the identity as canonical JSON, truncated."""
        canonical = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:32]

    def differences(self, other: "LabelSetSpec") -> list[str]:
        """Formats each differing field of the identity as ``field: mine / theirs``."""
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
