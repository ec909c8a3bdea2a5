"""The student of a training run: where its weights are from, and what of it is trained.

Needs no torch; see `trainer.config.train`.
"""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from schemas.config import StrictModel


class LoraConfig(StrictModel):
    """Low-rank adapters (arXiv 2106.09685) through peft; all other weights stay as they are."""

    rank: int = Field(16, ge=1, description="r: columns of each adapter")
    alpha: float = Field(32.0, gt=0.0, description="adapters are scaled by alpha / rank")
    rank_stabilised: bool = Field(
        False, description="scale by alpha / sqrt(rank) instead (arXiv 2312.03732)"
    )
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="on what goes into an adapter")
    target_modules: list[str] | Literal["all-linear"] = Field(
        "all-linear",
        description="names of linear layers, or their ends; all-linear: all but the head",
    )


class StudentConfig(StrictModel):
    """The model to train: an existing checkpoint, or a fresh one from a Hugging Face config."""

    path: str = Field("", description="checkpoint folder or hub name; empty: build from `config`")
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="Hugging Face config fields incl. model_type, for random initialisation",
    )
    seed: int = Field(0, description="seed of random initialisation, of adapters too")
    tokenizer: str = Field("", description="folder or hub name; empty: the one in `path`")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="type of the weights as built, in which those that adapters leave frozen stay; "
        "deepspeed.precision sets that of the training",
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] = Field(
        "sdpa", description="attention kernels of transformers"
    )
    lora: LoraConfig | None = Field(
        None, description="train adapters alone; the exported student has them merged"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if bool(self.path) == bool(self.config):
            raise ValueError(
                "student.path and student.config: exactly one of them says what the student is, "
                f"found {'both' if self.path else 'neither'}"
            )
        if self.config and "model_type" not in self.config:
            raise ValueError('student.config needs model_type, for example model_type = "llama"')
        if self.config and not self.tokenizer:
            raise ValueError("student.tokenizer is needed when the student is built from a config")
        return self
