"""Configuration of the student: the source of its weights, and which weights are trained.

Does not import torch; see `trainer.config.train`.
"""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from schemas.config import StrictModel


class LoraConfig(StrictModel):
    """Low-rank adapters (arXiv 2106.09685) from peft; all other weights are frozen."""

    rank: int = Field(16, ge=1, description="rank r of each adapter")
    alpha: float = Field(32.0, gt=0.0, description="adapters are scaled by alpha / rank")
    rank_stabilised: bool = Field(
        False, description="true: scale by alpha / sqrt(rank) instead (arXiv 2312.03732)"
    )
    dropout: float = Field(
        0.0, ge=0.0, lt=1.0, description="dropout on the input of an adapter; 0: none"
    )
    target_modules: list[str] | Literal["all-linear"] = Field(
        "all-linear",
        description="linear layers by full name or suffix; all-linear: all except the head",
    )


class StudentConfig(StrictModel):
    """The model to train: an existing checkpoint, or a new one from a Hugging Face config."""

    path: str = Field("", description="checkpoint folder or hub name; empty: use `config`")
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="Hugging Face config, including model_type, of a randomly initialised student",
    )
    seed: int = Field(0, description="seed of the random initialisation, including adapters")
    tokenizer: str = Field("", description="folder or hub name; empty: the tokenizer in `path`")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="dtype in which weights are loaded, and in which frozen weights stay; "
        "deepspeed.precision sets the training dtype",
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] = Field(
        "sdpa", description="attention implementation in transformers"
    )
    lora: LoraConfig | None = Field(
        None, description="train adapters only, merged on export; unset: train all weights"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if bool(self.path) == bool(self.config):
            raise ValueError(
                "student.path and student.config: set exactly one of them, found "
                f"{'both' if self.path else 'neither'}"
            )
        if self.config and "model_type" not in self.config:
            raise ValueError('student.config needs model_type, for example model_type = "llama"')
        if self.config and not self.tokenizer:
            raise ValueError("student.config needs student.tokenizer: set a folder or hub name")
        return self
