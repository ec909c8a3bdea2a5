"""What keeps a bad step from spoiling a student: guards over its loss and its gradient."""

import statistics

from trainer.config.train import GuardConfig

Recent = dict[str, list[float]]
"""Values of the latest steps, by what they are: what spikes are measured against."""

LOSS, GRADIENT = "loss", "gradient norm"

FEWEST = 10
"""Steps that have to be there before anything counts as a spike; a run begins with large ones."""


class BadStep(Exception):
    """A step that must not go on; the same on every rank.

    Attributes:
        what: LOSS or GRADIENT.
        value: what it was, the loss as a mean per label.
        median: of the steps before, where a spike was found; None where the value is not finite.
        step: counted from 1.
        micro_losses: this rank's loss sum of each micro-batch.
    """

    def __init__(self, what: str, value: float, median: float | None, step: int) -> None:
        super().__init__(f"the {what} of step {step} is {value}")
        self.what, self.value, self.median, self.step = what, value, median, step
        self.micro_losses: list[float] = []


class Guard:
    """Looks at the loss and the gradient of every step.

    Both are sums over all ranks, so all ranks come to the same verdict without asking each other.
    """

    def __init__(self, config: GuardConfig, recent: Recent) -> None:
        """
        Args:
            recent: where the run stands, from ``recent`` of an earlier guard, so that a run that
                was interrupted is guarded as one that was not.
        """
        self._config = config
        self._recent = {what: list(recent.get(what, [])) for what in (LOSS, GRADIENT)}

    @property
    def recent(self) -> Recent:
        """A copy of the values that the next step is measured against."""
        return {what: list(values) for what, values in self._recent.items()}

    def check_loss(self, step: int, loss: float, weight: float) -> str:
        """Looks at a step's loss sum (nats) over labels of a total weight.

        Returns:
            A warning; mostly nothing.

        Raises:
            BadStep: it is not finite, or a spike and ``guard.spikes`` is "stop".
        """
        return self._check(LOSS, step, loss / weight if weight else loss)

    def check_gradient(self, step: int, norm: float) -> str:
        """The same for the gradient norm before clipping."""
        return self._check(GRADIENT, step, norm)

    def _check(self, what: str, step: int, value: float) -> str:
        if not abs(value) < float("inf"):
            raise BadStep(what, value, None, step)
        recent = self._recent[what]
        median = statistics.median(recent) if len(recent) >= FEWEST else 0.0
        self._recent[what] = [*recent, value][-self._config.window_steps :]
        # A median of zero or less, which unbiased losses can have, gives nothing to compare with.
        is_spike = 0.0 < median * self._config.spike_factor < value
        if not is_spike or self._config.spikes == "off":
            return ""
        if self._config.spikes == "stop":
            raise BadStep(what, value, median, step)
        return f"step {step}: {what} {value:.4g}, {value / median:.1f} times the median before it"
