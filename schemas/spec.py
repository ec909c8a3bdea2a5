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

# Fields of a record that mean something for its kind alone, beside those that all labels have.
_OWN_FIELDS: dict[str, tuple[str, ...]] = {
    "tokens": (),
    "topk": ("k",),
    "topp": ("top_p", "max_head"),
    "sampled": ("draws", "draw_temperature", "draw_seed"),
    "threshold": ("tau", "draw_temperature", "draw_seed"),
}
_SHARED_FIELDS = ("kind", "temperatures", "entropy", "logprob_bits", "teacher_context")


class RecordSpec(StrictModel):
    """Which labels each position gets, and how precisely they are kept.

    Kinds, p being the teacher's distribution:

    - ``threshold``: every id with p >= tau exactly, the most probable always; of the others, draws
      at equal distances tau along their cumulative sum. Each draw stands for a probability of tau:
      an unbiased estimate of anything linear in p (Horvitz-Thompson).
    - ``sampled``: independent draws from p, with their counts (Random Sampling KD,
      arXiv 2503.16870). Unbiased too, with more variance.
    - ``topk``, ``topp``: an exact head and its mass; a biased target unless k is large.
    - ``tokens``: no teacher, for hard labels.
    """

    kind: RecordKind = Field(
        default="topk", description="what is kept of the teacher's distribution"
    )
    k: int = Field(default=64, ge=1, le=65535, description="topk: entries of a head")
    top_p: float = Field(
        default=0.98, gt=0.0, le=1.0, description="topp: the mass that a head covers"
    )
    max_head: int = Field(
        default=128, ge=1, le=65535, description="topp: entries of a head at most"
    )
    tau: float = Field(
        default=1 / 32,
        ge=1e-4,
        lt=1.0,
        description="threshold: ids at least this probable are kept exactly",
    )
    draws: int = Field(default=32, ge=1, le=255, description="sampled: draws of a position")
    draw_temperature: float | None = Field(
        default=None,
        gt=0.0,
        description="sampled, threshold: the distribution that is drawn from, and that tau is "
        "compared with, is p^(1/T) normalised; unset: the largest of 1 and temperatures",
    )
    draw_seed: int = Field(
        default=0, ge=0, lt=2**64, description="sampled, threshold: another seed, other draws"
    )
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

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        own = _OWN_FIELDS[self.kind]
        for name in {name for names in _OWN_FIELDS.values() for name in names} - set(own):
            if getattr(self, name) != RecordSpec.model_fields[name].default:
                kinds = [kind for kind, names in _OWN_FIELDS.items() if name in names]
                raise ValueError(
                    f"record.{name} means something for kind {' and '.join(kinds)} only, but "
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
        """Whether positions have tail draws, and with them unbiased labels."""
        return self.kind in ("sampled", "threshold")

    @property
    def drawn_at(self) -> float:
        """The temperature of the distribution that tail draws are from."""
        if self.draw_temperature is not None:
            return self.draw_temperature
        return max((1.0, *self.temperatures))

    def most_entries(self, vocab_size: int) -> int:
        """How many entries a position has at most."""
        most = {
            "tokens": 0,
            "topk": self.k,
            "topp": self.max_head,
            "sampled": self.draws,
            # The head takes tau or more from what is drawn from; but for a head of one, perhaps.
            "threshold": int(1 / self.tau) + 2,
        }
        return min(most[self.kind], vocab_size)

    @property
    def draw_share(self) -> float:
        """What one draw stands for, as a share of the distribution drawn from; 0 without draws."""
        if self.kind == "threshold":
            return self.tau
        return 1.0 / self.draws if self.kind == "sampled" else 0.0

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of a label set of this spec, in the order of the schema."""
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
        """The fields that mean something for this kind, the temperature of draws filled in."""
        if self.kind == "tokens":
            return self.model_dump(mode="json", include={"kind", "teacher_context"})
        own = _OWN_FIELDS[self.kind]
        fields = self.model_dump(mode="json", include={*_SHARED_FIELDS, *own})
        if self.has_draws:
            fields["draw_temperature"] = self.drawn_at
        return fields


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
        fields["record"] = self.record.identity()
        if self.record.kind == "tokens":
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
