"""The run state stored in every checkpoint's manifest: counters and early stopping."""

from pydantic import Field

from schemas.config import StrictModel
from trainer.config.train import EvalConfig
from trainer.data.row_order import LoaderState


class EarlyStopping(StrictModel):
    """State of early stopping.

    Attributes:
        best: lowest value of ``eval.metric`` so far, nats per label; None before the first.
        best_step: step of ``best``.
        without_improvement: evaluations since then.
    """

    best: float | None = None
    best_step: int = 0
    without_improvement: int = 0

    def after(self, step: int, value: float, config: EvalConfig) -> "EarlyStopping":
        """Returns the state after an evaluation that measured ``value`` at ``step``."""
        if self.best is None or value < self.best - config.min_improvement:
            return EarlyStopping(best=value, best_step=step)
        return self.model_copy(update={"without_improvement": self.without_improvement + 1})

    def is_over(self, config: EvalConfig | None) -> bool:
        """Whether the last ``eval.patience`` evaluations brought no improvement."""
        return config is not None and 0 < config.patience <= self.without_improvement


class TrainProgress(StrictModel):
    """Progress of a run: everything needed to resume, except weights and optimizer.

    Attributes:
        step: global steps done.
        tokens: tokens of the rows trained on.
        labels: labelled positions among them.
        pending: sums since the last line of metrics.jsonl, by name.
        recent: the guard's latest values, the reference for spikes.
        metrics: latest metrics by name: ``loss``, ``ce`` and ``kl`` of the last line of
            metrics.jsonl, and those of the last evaluation. Empty before the first.
        base_digest: digest of the frozen weights, which checkpoints omit; empty: none is frozen.
    """

    step: int
    loader: LoaderState
    tokens: int
    labels: int
    final_loss: float
    pending: dict[str, float]
    recent: dict[str, list[float]] = Field(default_factory=dict)
    metrics: dict[str, float] = Field(default_factory=dict)
    evaluation: EarlyStopping = Field(default_factory=EarlyStopping)
    base_digest: str = ""
