"""Configuration and result of an evaluation, ``evaluate.toml``.

Does not import torch, so a configuration is validated before anything heavy is loaded.
"""

from typing import Literal

from pydantic import Field, field_validator

from schemas.config import StrictModel

TEACHER = "teacher"
"""Name of the teacher in the result."""


class EvaluateConfig(StrictModel):
    """One comparison of students with their teacher: ``tutelage evaluate evaluate.toml``."""

    view: str = Field(description="URL of the view with the held-out rows")
    teacher: str = Field(description="checkpoint folder or hub name of the teacher")
    students: dict[str, str] = Field(
        description="students by name: name = checkpoint folder or hub name"
    )
    max_rows: int = Field(
        0, ge=0, description="rows to evaluate, spread evenly over the view; 0: all"
    )
    batch_tokens: int = Field(8192, ge=1, description="tokens per forward pass, including padding")
    chunk_tokens: int = Field(
        512, ge=1, description="positions whose logits are in memory at once, per model"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of all models, including the teacher"
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
            raise ValueError(f'students: "{TEACHER}" is reserved for the teacher; rename it')
        return value


class ModelMetrics(StrictModel):
    """Metrics of one model on the held-out rows.

    Attributes:
        cross_entropy: with the text, nats per label.
        perplexity: exponential of ``cross_entropy``.
        kl_to_teacher: KL(teacher || model) of full distributions, nats per label.
        top1_agreement: share of labels where model and teacher agree on the most probable token.
        top1_accuracy: share of labels where the model's most probable token is the text's.
        ece: expected calibration error of that token, 15 bins of equal width, 0 to 1.
        parameters: number of parameters, tied ones counted once.
        tokens_per_s: throughput of the forward pass up to the labels' logits, on this machine.
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
    """Result of one comparison; the teacher comes first in `models`."""

    view: str
    view_hash: str
    rows: int
    tokens: int
    labels: int
    device: str
    seconds: float
    models: dict[str, ModelMetrics]
