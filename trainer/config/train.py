"""Configuration of a training run, ``train.toml``.

Imports neither torch, Ray nor DeepSpeed, so a configuration is validated before any of them is
loaded. Every default of the trainer is defined on a field here and nowhere else.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from schemas.config import Count, StrictModel, count_bounds
from trainer.config.student import StudentConfig

LossKind = Literal[
    "hard",
    "truncated",
    "renormalised",
    "ghost",
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_kl",
    "tvd",
]

# Fields that apply to a single kind of loss; all other fields of LossConfig apply to every kind.
_OWN_LOSS_FIELDS: dict[str, str] = {"beta": "jsd", "skew": "skew_kl"}


class LossConfig(StrictModel):
    """Training loss per labelled position: (1 - alpha) * CE + alpha * T^2 * objective."""

    kind: LossKind = Field(
        "forward_kl",
        description="training objective; hard: cross-entropy with the text, without the teacher; "
        "forward_kl: unbiased on labels with draws (sampled, threshold); reverse_kl, jsd, skew_kl "
        "and tvd compare the cached ids and one bucket for all others",
    )
    mix: dict[LossKind, float] = Field(
        default_factory=dict,
        description="more objectives and their shares of the distillation term, for example "
        "{reverse_kl = 0.3}; `kind` gets the rest; empty: `kind` alone",
    )
    alpha: float = Field(
        1.0, ge=0.0, le=1.0, description="weight of the distillation term; 1: no CE"
    )
    temperature: float = Field(
        1.0, gt=0.0, description="distillation temperature T; 1: unscaled logits"
    )
    beta: float = Field(
        0.5,
        gt=0.0,
        lt=1.0,
        description="jsd only: the teacher's share of the mixture, and the weight of its KL",
    )
    skew: float = Field(
        0.1, gt=0.0, lt=1.0, description="skew_kl only: the teacher's share of the mixture"
    )
    approximate_temperature: bool = Field(
        False,
        description="forward_kl only: if T is above the temperature of the draws, use the ghost "
        "objective; false: refuse to train",
    )
    head_memory_bytes: int | None = Field(
        None,
        ge=1,
        description="memory for one chunk of the fused head: its logits and all arrays of that "
        "size; unset: 64 MiB on a CPU (at most 512 positions), 1/64 of a GPU's memory. Changes "
        "results only within rounding",
    )
    chunk_tokens: int | None = Field(
        None,
        ge=1,
        description="positions per chunk of the fused head; unset: as many as fit into "
        "head_memory_bytes",
    )
    kernel: Literal["torch", "triton"] = Field(
        "torch",
        description="implementation of the passes over the head's logits; triton needs fewer "
        "passes and a GPU, and has been tested only in Triton's interpreter",
    )

    @model_validator(mode="after")
    def _hard_has_no_teacher(self) -> Self:
        if self.kind == "hard" and self.temperature != 1.0:
            raise ValueError(
                f'loss.temperature = {self.temperature} has no effect with loss.kind = "hard"; '
                "remove it or choose an objective that uses the teacher"
            )
        return self

    @model_validator(mode="after")
    def _one_chunk_size(self) -> Self:
        if self.chunk_tokens is not None and self.head_memory_bytes is not None:
            raise ValueError(
                f"loss.chunk_tokens = {self.chunk_tokens} and loss.head_memory_bytes = "
                f"{self.head_memory_bytes} both set the chunk size: remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _own_fields(self) -> Self:
        for name, kind in _OWN_LOSS_FIELDS.items():
            value = getattr(self, name)
            named = (self.kind, *self.mix)
            if kind not in named and value != LossConfig.model_fields[name].default:
                raise ValueError(
                    f'loss.{name} = {value} applies to loss.kind = "{kind}" only, but loss.kind is '
                    f'"{self.kind}"; remove it'
                )
        return self

    @model_validator(mode="after")
    def _mix_leaves_some(self) -> Self:
        if self.mix and (self.kind == "hard" or "hard" in self.mix):
            raise ValueError(
                "loss.mix takes only objectives that use the teacher; the share of hard labels is "
                "1 - loss.alpha"
            )
        shares = list(self.mix.values())
        if self.kind in self.mix or min(shares, default=1.0) <= 0.0 or sum(shares) >= 1.0:
            raise ValueError(
                f"loss.mix = {self.mix} with loss.kind = {self.kind}: expected positive shares of "
                "other objectives with a sum below 1; `kind` gets the rest"
            )
        return self

    def objectives(self) -> list[tuple[float, "LossConfig"]]:
        """Splits the mix into (share, loss without a mix); shares sum to 1."""
        shares = {self.kind: 1.0 - sum(self.mix.values()), **self.mix}
        return [
            (share, self.model_copy(update={"kind": kind, "mix": {}}))
            for kind, share in shares.items()
        ]


class DataConfig(StrictModel):
    """How rows are packed into global steps; the order depends only on this table and the view."""

    max_tokens: int = Field(ge=2, description="tokens per packed sequence: the context length")
    sequences_per_step: int = Field(
        ge=1, description="packed sequences per global step, over all workers (one per lane)"
    )
    micro_batch_size: int = Field(1, ge=1, description="packed sequences per forward pass")
    seed: int = Field(0, ge=0, description="seed of the row order")
    epochs: int | None = Field(None, ge=1, description="passes over the view; set this or `steps`")
    steps: int | None = Field(
        None, ge=1, description="global steps, over as many epochs as needed; set this or `epochs`"
    )
    window_row_groups: int = Field(
        4, ge=1, description="shuffle window of a lane, in row groups or pieces of one"
    )
    long_rows: Literal["error", "drop"] = Field(
        "error", description="rows longer than max_tokens: refuse the view, or drop them"
    )
    cache_bytes: int = Field(1 << 30, ge=0, description="memory for decoded row groups, per worker")
    prefetch_steps: int = Field(2, ge=1, description="global steps to prefetch")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(
                "data.epochs and data.steps: set exactly one of them, found "
                f"{'neither' if self.epochs is None else 'both'}"
            )
        return self


class OptimizerConfig(StrictModel):
    """AdamW; weight decay applies to matrices, not to norms and biases."""

    lr: float = Field(1e-4, gt=0.0, description="peak learning rate of the schedule")
    betas: tuple[float, float] = Field(
        (0.9, 0.95),
        description="decay rates of the moving averages of gradient and squared gradient",
    )
    eps: float = Field(1e-8, gt=0.0, description="added to the denominator of the update")
    weight_decay: float = Field(0.1, ge=0.0, description="decoupled weight decay, multiplied by lr")


class ScheduleConfig(StrictModel):
    """Learning-rate schedule: a linear warm-up, then a decay to min_lr_ratio of the peak."""

    kind: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="shape of the decay after the warm-up; constant: no decay"
    )
    warmup_steps: int = Field(0, ge=0, description="warm-up in steps; set this or warmup_ratio")
    warmup_ratio: float = Field(
        0.0, ge=0.0, lt=1.0, description="warm-up as a share of all steps; set this or warmup_steps"
    )
    min_lr_ratio: float = Field(
        0.1, ge=0.0, le=1.0, description="final learning rate as a share of the peak"
    )

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"schedule.warmup_steps = {self.warmup_steps} and schedule.warmup_ratio = "
                f"{self.warmup_ratio} both set the warm-up: remove one of them"
            )
        return self


class DeepSpeedConfig(StrictModel):
    """The DeepSpeed engine."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        0,
        description="ZeRO stage: what is sharded over the ranks; 0: nothing; 1: optimizer state; "
        "2: also gradients; 3: also weights",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="training dtype; bf16 keeps float32 master weights"
    )
    gradient_clipping: float = Field(
        1.0, ge=0.0, description="maximum global gradient norm; 0: no clipping"
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass, to save memory"
    )
    timeout_s: int = Field(1800, ge=1, description="seconds after which a collective fails")
    native: dict[str, Any] = Field(
        default_factory=dict,
        description="DeepSpeed configuration to pass through, including optimizer and scheduler; "
        "contradicting another key of this file is an error",
    )


class RayConfig(StrictModel):
    """Where the workers run."""

    num_workers: Count = Field(
        1,
        description="data-parallel ranks, a number or {min, max}: a run waits for min and uses up "
        "to max; row order and losses do not depend on it",
    )
    resize_check_s: float = Field(
        60.0, gt=0.0, description="with {min, max}: seconds between checks for free resources"
    )
    cpus_per_worker: int = Field(1, ge=1, description="CPUs and torch threads per worker")
    use_gpu: bool = Field(False, description="true: one GPU per worker; false: CPUs only")
    address: str = Field("", description="Ray address; empty: RAY_ADDRESS, else a local Ray")
    max_failures: int = Field(
        3, ge=0, description="worker failures after which to resume from the last checkpoint"
    )

    @property
    def min_workers(self) -> int:
        """Minimum number of ranks."""
        return count_bounds(self.num_workers)[0]

    @property
    def max_workers(self) -> int:
        """Maximum number of ranks."""
        return count_bounds(self.num_workers)[1]


class CheckpointConfig(StrictModel):
    """Checkpoints, from which an interrupted run resumes."""

    every_steps: int = Field(200, ge=1, description="global steps between checkpoints")
    keep: int = Field(2, ge=1, description="newest checkpoints to keep")
    keep_best: int = Field(
        0, ge=0, description="best checkpoints by best_metric to keep in addition"
    )
    best_metric: Literal["loss", "ce", "kl", "eval_ce", "eval_kl"] = Field(
        "loss",
        description="metric that ranks checkpoints, by its latest value before each: loss, ce or "
        "kl in training, or a held-out metric of [eval]",
    )
    best_is: Literal["lowest", "highest"] = Field(
        "lowest", description="whether lower or higher values of best_metric are better"
    )
    asynchronous: bool = Field(
        True,
        description="keep training while a checkpoint is written; needs host memory for a copy of "
        "weights and optimizer state",
    )


class GuardConfig(StrictModel):
    """Guards against steps that would corrupt the student.

    A non-finite loss or gradient norm always stops the run before the step is saved.
    """

    spikes: Literal["off", "warn", "stop"] = Field(
        "warn", description="reaction to a spike of the loss or the gradient norm"
    )
    spike_factor: float = Field(
        5.0, gt=1.0, description="a value above this multiple of the preceding median is a spike"
    )
    window_steps: int = Field(50, ge=10, description="steps over which the median is taken")


class EvalConfig(StrictModel):
    """Evaluation of the student on held-out rows during training."""

    view: str = Field(description="URL of the view with the held-out rows")
    every_steps: int = Field(
        200, ge=1, description="global steps between evaluations; the last step is also evaluated"
    )
    max_rows: int = Field(
        256, ge=0, description="rows to evaluate, spread evenly over the view; 0: all"
    )
    metric: Literal["ce", "kl"] = Field(
        "ce", description="early-stopping metric; kl: a lower bound of KL(teacher || student)"
    )
    patience: int = Field(
        0, ge=0, description="stop after this many evaluations without improvement; 0: never"
    )
    min_improvement: float = Field(
        0.0, ge=0.0, description="smallest decrease that counts as an improvement, nats per label"
    )


class LogConfig(StrictModel):
    """Where the learning curve is logged."""

    every_steps: int = Field(
        10, ge=1, description="global steps averaged in each line of metrics.jsonl"
    )
    wandb_project: str = Field(
        "", description="Weights & Biases project to log to; empty: none; needs the package wandb"
    )
    mlflow_uri: str = Field(
        "", description="MLflow tracking URI to log to; empty: none; needs the package mlflow"
    )
    tensorboard: bool = Field(True, description="write TensorBoard events if it is installed")
    rows: bool = Field(False, description="write rows.jsonl: the row keys of every step, in order")


class WeightedView(StrictModel):
    """One view of a mixture."""

    view: str = Field(description="URL of the view")
    weight: float = Field(gt=0.0, description="share of the tokens, relative to the other views")


# Discriminated before validation, so that errors refer only to the given form.
_OneOrMore = Annotated[
    Annotated[str, Tag("url")] | Annotated[list[WeightedView], Tag("mixture")],
    Discriminator(lambda value: "mixture" if isinstance(value, list) else "url"),
]


class TrainConfig(StrictModel):
    """One training run: ``tutelage train train.toml``."""

    run: str = Field(description="folder or URL for checkpoints, metrics and the student")
    view: _OneOrMore = Field(
        description="URL of the view to train on, or several views with weights"
    )
    student: StudentConfig
    loss: LossConfig = LossConfig()
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    ray: RayConfig = RayConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    eval: EvalConfig | None = Field(None, description="unset: no evaluation during training")
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _best_is_measured(self) -> Self:
        wanted = self.checkpoint.best_metric
        if wanted.startswith("eval_") and self.eval is None:
            raise ValueError(
                f'checkpoint.best_metric = "{wanted}" needs [eval], which is missing; '
                "add it with a view of held-out rows"
            )
        return self

    @model_validator(mode="after")
    def _mixture_has_a_length(self) -> Self:
        if isinstance(self.view, str):
            return self
        if not self.view:
            raise ValueError("view is an empty list; name at least one view")
        if self.data.steps is None:
            raise ValueError(
                "data.epochs is undefined for a mixture, whose views end at different times; set "
                "data.steps"
            )
        return self
