"""Guards against steps that would corrupt the student, by loss and gradient norm."""

import statistics

from trainer.config.train import GuardConfig

Recent = dict[str, list[float]]
"""Values of the latest steps, by LOSS or GRADIENT; spikes are relative to their median."""

LOSS, GRADIENT = "loss", "gradient norm"

MIN_RECENT_STEPS = 10
"""Steps before any value counts as a spike, since runs start with large losses and gradients."""


class BadStep(Exception):
    """A step whose update must not be kept; raised on every rank.

    Attributes:
        what: LOSS or GRADIENT.
        value: mean loss per label, or the gradient norm.
        median: median of the preceding steps, for a spike; None for a non-finite value.
        step: counted from 1.
        micro_losses: this rank's loss sum per micro-batch.
    """

    def __init__(self, what: str, value: float, median: float | None, step: int) -> None:
        super().__init__(f"the {what} of step {step} is {value}")
        self.what, self.value, self.median, self.step = what, value, median, step
        self.micro_losses: list[float] = []


class Guard:
    """Checks the loss and the gradient norm of every step.

    Both are reduced over all ranks, so every rank decides alike without communication.
    """

    def __init__(self, config: GuardConfig, recent: Recent) -> None:
        """
        Args:
            recent: the guard's ``recent`` at the checkpoint, so that a resumed run is guarded like
                an uninterrupted one.
        """
        self._config = config
        self._recent = {what: list(recent.get(what, [])) for what in (LOSS, GRADIENT)}

    @property
    def recent(self) -> Recent:
        """A copy of the latest values."""
        return {what: list(values) for what, values in self._recent.items()}

    def check_loss(self, step: int, loss: float, weight: float) -> str:
        """Checks a step's loss sum (nats) over labels with the given total weight.

        Returns:
            A warning, usually empty.

        Raises:
            BadStep: the loss is non-finite, or is a spike and ``guard.spikes`` is "stop".
        """
        return self._check(LOSS, step, loss / weight if weight else loss)

    def check_gradient(self, step: int, norm: float) -> str:
        """Like `check_loss`, for the gradient norm before clipping."""
        return self._check(GRADIENT, step, norm)

    def _check(self, what: str, step: int, value: float) -> str:
        if not abs(value) < float("inf"):  # also true for nan
            raise BadStep(what, value, None, step)
        recent = self._recent[what]
        median = statistics.median(recent) if len(recent) >= MIN_RECENT_STEPS else 0.0
        # Spikes enter the window too, so that a lasting change of level soon stops being one.
        self._recent[what] = [*recent, value][-self._config.window_steps :]
        # Unbiased losses can be negative, and a median <= 0 gives no scale for a spike.
        is_spike = 0.0 < median * self._config.spike_factor < value
        if not is_spike or self._config.spikes == "off":
            return ""
        if self._config.spikes == "stop":
            raise BadStep(what, value, median, step)
        return f"step {step}: {what} {value:.4g}, {value / median:.1f} times the median before it"
