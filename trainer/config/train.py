"""What one training run is: the model behind ``train.toml``.

Needs neither torch, Ray nor DeepSpeed, so that a configuration is checked before anything heavy is
imported. Every default of the trainer is on a field here and nowhere else.
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

# The kinds of loss that a field means something for; the other fields of it mean it for all.
_OWN_LOSS_FIELDS: dict[str, str] = {"beta": "jsd", "skew": "skew_kl"}


class LossConfig(StrictModel):
    """Which training target the labels become, per position (1 - alpha) * CE + alpha * T^2 * KL."""

    kind: LossKind = Field(
        "forward_kl",
        description="hard uses the tokens alone, never the teacher; forward_kl is the unbiased "
        "target of labels with draws (sampled, threshold); reverse_kl, jsd, skew_kl and tvd "
        "compare the cached ids and one bucket for all others",
    )
    mix: dict[LossKind, float] = Field(
        default_factory=dict,
        description="shares of further targets in the distillation term, for example {reverse_kl = "
        "0.3}; `kind` has the rest",
    )
    alpha: float = Field(1.0, ge=0.0, le=1.0, description="weight of the distillation term")
    temperature: float = Field(1.0, gt=0.0, description="distillation temperature T")
    beta: float = Field(
        0.5,
        gt=0.0,
        lt=1.0,
        description="jsd: the teacher's share of the mixture, and the weight of its side",
    )
    skew: float = Field(
        0.1, gt=0.0, lt=1.0, description="skew_kl: the teacher's share of the mixture"
    )
    approximate_temperature: bool = Field(
        False,
        description="forward_kl: where T is above the temperature that draws were made at, take "
        "the ghost target instead of refusing",
    )
    head_memory_bytes: int | None = Field(
        None,
        ge=1,
        description="memory for the logits of one chunk of the fused head and all arrays of their "
        "size; unset: 64 MiB on a CPU (512 positions at most), a 64th of a GPU's memory. Changes "
        "results within rounding",
    )
    chunk_tokens: int | None = Field(
        None,
        ge=1,
        description="positions per chunk of the fused head; unset: what head_memory_bytes holds",
    )

    kernel: Literal["torch", "triton"] = Field(
        "torch",
        description="what walks over the head's logits; triton is for GPUs, walks less often, and "
        "has been checked in Triton's interpreter only",
    )

    @model_validator(mode="after")
    def _hard_has_no_teacher(self) -> Self:
        if self.kind == "hard" and self.temperature != 1.0:
            raise ValueError(
                f'loss.temperature = {self.temperature} has no meaning with loss.kind = "hard"; '
                "remove it or choose a target that uses the teacher"
            )
        return self

    @model_validator(mode="after")
    def _one_chunk_size(self) -> Self:
        if self.chunk_tokens is not None and self.head_memory_bytes is not None:
            raise ValueError(
                f"loss.chunk_tokens = {self.chunk_tokens} and loss.head_memory_bytes = "
                f"{self.head_memory_bytes} both say how large a chunk is: give one of them"
            )
        return self

    @model_validator(mode="after")
    def _own_fields(self) -> Self:
        for name, kind in _OWN_LOSS_FIELDS.items():
            value = getattr(self, name)
            named = (self.kind, *self.mix)
            if kind not in named and value != LossConfig.model_fields[name].default:
                raise ValueError(
                    f'loss.{name} = {value} means something for loss.kind = "{kind}" only, but '
                    f'loss.kind is "{self.kind}"; remove it'
                )
        return self

    @model_validator(mode="after")
    def _mix_leaves_some(self) -> Self:
        if self.mix and (self.kind == "hard" or "hard" in self.mix):
            raise ValueError(
                "loss.mix is of targets that use the teacher; the share of hard labels is 1 - "
                "loss.alpha"
            )
        shares = list(self.mix.values())
        if self.kind in self.mix or min(shares, default=1.0) <= 0.0 or sum(shares) >= 1.0:
            raise ValueError(
                f"loss.mix = {self.mix} beside loss.kind = {self.kind}: shares are of other "
                "targets, above 0, and sum to less than 1, so that `kind` has the rest"
            )
        return self

    def targets(self) -> list[tuple[float, "LossConfig"]]:
        """The distillation term taken apart: shares that sum to 1, and losses of one target."""
        shares = {self.kind: 1.0 - sum(self.mix.values()), **self.mix}
        return [
            (share, self.model_copy(update={"kind": kind, "mix": {}}))
            for kind, share in shares.items()
        ]


class DataConfig(StrictModel):
    """How rows become global steps. The order depends on these values and the view alone."""

    max_tokens: int = Field(ge=2, description="tokens of one packed sequence: the context length")
    sequences_per_step: int = Field(
        ge=1, description="packed sequences (lanes) in one global step, over all workers"
    )
    micro_batch_size: int = Field(1, ge=1, description="packed sequences in one forward pass")
    seed: int = Field(0, ge=0, description="seed of the order of rows")
    epochs: int | None = Field(None, ge=1, description="passes over the view; or give `steps`")
    steps: int | None = Field(
        None, ge=1, description="global steps, over as many epochs as they need; or give `epochs`"
    )
    window_row_groups: int = Field(
        4, ge=1, description="row groups (or pieces of one) a lane shuffles rows within"
    )
    long_rows: Literal["error", "drop"] = Field(
        "error", description="what to do with rows longer than max_tokens"
    )
    cache_bytes: int = Field(
        1 << 30, ge=0, description="decoded row groups kept in memory, per worker"
    )
    prefetch_steps: int = Field(2, ge=1, description="global steps prepared ahead of the training")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(
                "data.epochs and data.steps: exactly one of them says how long to train, found "
                f"{'neither' if self.epochs is None else 'both'}"
            )
        return self


class OptimizerConfig(StrictModel):
    """AdamW. Weight decay is applied to matrices only, not to norms and biases."""

    lr: float = Field(1e-4, gt=0.0, description="peak learning rate")
    betas: tuple[float, float] = Field(
        (0.9, 0.95), description="decay rates of the averages of the gradient and of its square"
    )
    eps: float = Field(1e-8, gt=0.0, description="added to the denominator of the update")
    weight_decay: float = Field(0.1, ge=0.0, description="decoupled weight decay")


class ScheduleConfig(StrictModel):
    """Learning rate by step: a linear warm-up, then the named decay to min_lr_ratio of the peak."""

    kind: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="shape of the decay after the warm-up"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of the warm-up; or warmup_ratio")
    warmup_ratio: float = Field(0.0, ge=0.0, lt=1.0, description="of all steps; or warmup_steps")
    min_lr_ratio: float = Field(
        0.1, ge=0.0, le=1.0, description="final learning rate as a share of the peak"
    )

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"schedule.warmup_steps = {self.warmup_steps} and schedule.warmup_ratio = "
                f"{self.warmup_ratio}: give one of them"
            )
        return self


class DeepSpeedConfig(StrictModel):
    """What the DeepSpeed engine does."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        0,
        description="what the ranks shard: 0: nothing; 1: optimizer state; 2: gradients too; "
        "3: weights too",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="arithmetic of the training; bf16 keeps float32 master weights"
    )
    gradient_clipping: float = Field(
        1.0, ge=0.0, description="global gradient norm; 0: no clipping"
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass, to save memory"
    )
    timeout_s: int = Field(1800, ge=1, description="a collective that takes longer is an error")
    native: dict[str, Any] = Field(
        default_factory=dict,
        description="DeepSpeed configuration passed through, optimizer and scheduler too; "
        "contradictions with ours are errors",
    )


class RayConfig(StrictModel):
    """Where the workers run."""

    num_workers: Count = Field(
        1,
        description="data-parallel ranks, a number or {min, max}: a run waits for min and uses up "
        "to max; the order of rows and the losses do not depend on it",
    )
    resize_check_s: float = Field(
        60.0, gt=0.0, description="with {min, max}: how often the cluster is asked for more room"
    )
    cpus_per_worker: int = Field(1, ge=1, description="CPUs and torch threads of one worker")
    use_gpu: bool = Field(False, description="one GPU for every worker")
    address: str = Field("", description="Ray address; empty: RAY_ADDRESS, else this machine alone")
    max_failures: int = Field(
        3, ge=0, description="lost workers to recover from; each resumes from the last checkpoint"
    )

    @property
    def min_workers(self) -> int:
        """The fewest ranks that train."""
        return count_bounds(self.num_workers)[0]

    @property
    def max_workers(self) -> int:
        """The most ranks that train."""
        return count_bounds(self.num_workers)[1]


class CheckpointConfig(StrictModel):
    """What is kept so that a killed run goes on where it was."""

    every_steps: int = Field(200, ge=1, description="steps from one checkpoint to the next")
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    keep_best: int = Field(
        0, ge=0, description="checkpoints kept besides for the best values of best_metric"
    )
    best_metric: Literal["loss", "ce", "kl", "eval_ce", "eval_kl"] = Field(
        "loss",
        description="what was measured last when a checkpoint was saved: loss, ce or kl of the "
        "training, or the held-out values of [eval]",
    )
    best_is: Literal["lowest", "highest"] = Field(
        "lowest", description="which value of best_metric is best"
    )
    asynchronous: bool = Field(
        True,
        description="train on while a checkpoint is written, at the price of host memory for a "
        "copy of weights and optimizer",
    )


class GuardConfig(StrictModel):
    """What is done about a step that would spoil the student.

    A loss or gradient that is not finite always stops the run, before the step is kept.
    """

    spikes: Literal["off", "warn", "stop"] = Field(
        "warn", description="what a sudden jump of the loss or the gradient norm leads to"
    )
    spike_factor: float = Field(
        5.0, gt=1.0, description="a jump: this many times the median of the steps before"
    )
    window_steps: int = Field(50, ge=10, description="steps that the median is taken over")


class EvalConfig(StrictModel):
    """Measuring the student on held-out rows while it trains."""

    view: str = Field(description="URL of the view with the held-out rows")
    every_steps: int = Field(200, ge=1, description="and after the last step")
    max_rows: int = Field(
        256, ge=0, description="rows to use, spread evenly over the view; 0: all of them"
    )
    metric: Literal["ce", "kl"] = Field(
        "ce", description="what early stopping looks at; kl: the lower bound of KL to the teacher"
    )
    patience: int = Field(
        0, ge=0, description="evaluations without an improvement that end the run; 0: none do"
    )
    min_improvement: float = Field(
        0.0, ge=0.0, description="nats per label by which a value has to be lower to count"
    )


class LogConfig(StrictModel):
    """The learning curve."""

    every_steps: int = Field(10, ge=1, description="steps averaged in one line of metrics.jsonl")
    wandb_project: str = Field(
        "", description="Weights & Biases project to log to as well; needs the package wandb"
    )
    mlflow_uri: str = Field(
        "", description="MLflow tracking URI to log to as well; needs the package mlflow"
    )
    tensorboard: bool = Field(True, description="also write TensorBoard events where installed")
    rows: bool = Field(
        False, description="also write rows.jsonl: the keys of the rows of every step, in order"
    )


class WeightedView(StrictModel):
    """One view of a mixture."""

    view: str = Field(description="URL of the view")
    weight: float = Field(gt=0.0, description="its share of the tokens, relative to the others'")


# Told apart before either is checked, so that an error is about the one that is meant.
_OneOrMore = Annotated[
    Annotated[str, Tag("url")] | Annotated[list[WeightedView], Tag("mixture")],
    Discriminator(lambda value: "mixture" if isinstance(value, list) else "url"),
]


class TrainConfig(StrictModel):
    """One training run: ``tutelage train train.toml``."""

    run: str = Field(description="folder of checkpoints, metrics and the exported student")
    view: _OneOrMore = Field(
        description="URL of the view that holds the rows to train on, or several with weights"
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
    eval: EvalConfig | None = Field(None, description="no evaluation where it is left out")
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _best_is_measured(self) -> Self:
        wanted = self.checkpoint.best_metric
        if wanted.startswith("eval_") and self.eval is None:
            raise ValueError(
                f'checkpoint.best_metric = "{wanted}" is measured by [eval], which is left out; '
                "give it a view of held-out rows"
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
                "data.epochs has no meaning for a mixture of views, which end at different times; "
                "give data.steps"
            )
        return self
