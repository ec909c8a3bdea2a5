"""The configuration of an evaluation, ``evaluate.toml``, and its result.

Imports no torch, so that a configuration is checked before anything heavy is loaded.
"""

from typing import Literal

from pydantic import Field, field_validator

from schemas.config import StrictModel

TEACHER = "teacher"
"""Name of the teacher's own row in the result."""


class EvaluateConfig(StrictModel):
    """One comparison of students with their teacher: ``tutelage evaluate evaluate.toml``."""

    view: str = Field(description="URL of the view with the held-out rows")
    teacher: str = Field(description="checkpoint folder or hub name of the teacher")
    students: dict[str, str] = Field(description="name = checkpoint folder or hub name")
    max_rows: int = Field(
        0, ge=0, description="rows to use, spread evenly over the view; 0: all of them"
    )
    batch_tokens: int = Field(8192, ge=1, description="tokens per forward pass, padding included")
    chunk_tokens: int = Field(
        512, ge=1, description="positions whose logits are in memory at a time, per model"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of all models, the teacher included"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: a GPU if torch sees one, else the CPU"
    )

    @field_validator("students")
    @classmethod
    def _other_names(cls, value: dict[str, str]) -> dict[str, str]:
        if not value:
            raise ValueError("students is empty; name at least one, as in kd = PATH")
        if TEACHER in value:
            raise ValueError(f'students has the name "{TEACHER}", which is the teacher\'s own')
        return value


class ModelMetrics(StrictModel):
    """Metrics of one model on the held-out rows.

    Attributes:
        cross_entropy: with the text, nats per label.
        perplexity: its exponential.
        kl_to_teacher: KL(teacher || model) of full distributions, nats per label.
        top1_agreement: share of labels where model and teacher have the same most probable token.
        top1_accuracy: share of labels where the model's most probable token is that of the text.
        ece: expected calibration error of that token, 15 bins of equal width, 0 to 1.
        parameters: of the model, tied ones counted once.
        tokens_per_s: forward passes up to the logits of the labels, on the machine of this run.
    """

    cross_entropy: float
    perplexity: float
    kl_to_teacher: float
    top1_agreement: float
    top1_accuracy: float
    ece: float
    parameters: int
    tokens_per_s: float


class EvaluateSummary(StrictModel):
    """The result of one comparison; the teacher is first in `models`."""

    view: str
    view_hash: str
    rows: int
    tokens: int
    labels: int
    device: str
    seconds: float
    models: dict[str, ModelMetrics]
