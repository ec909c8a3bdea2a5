"""When to stop because the held-out rows get no better."""

from schemas.config import StrictModel
from trainer.config.train import EvalConfig


class EvalState(StrictModel):
    """Where early stopping stands; a part of every checkpoint.

    Attributes:
        best: lowest value of ``eval.metric`` so far; None: nothing was measured yet.
        best_step: the step that it was measured at.
        without_improvement: evaluations since then.
    """

    best: float | None = None
    best_step: int = 0
    without_improvement: int = 0

    def after(self, step: int, value: float, config: EvalConfig) -> "EvalState":
        """With one more evaluation, which gave ``value`` after ``step`` steps."""
        if self.best is None or value < self.best - config.min_improvement:
            return EvalState(best=value, best_step=step)
        return self.model_copy(update={"without_improvement": self.without_improvement + 1})

    def is_over(self, config: EvalConfig | None) -> bool:
        """Whether the run has gone on for long enough without an improvement."""
        return config is not None and 0 < config.patience <= self.without_improvement
