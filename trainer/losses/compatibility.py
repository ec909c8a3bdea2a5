"""Checks before training that labels of a record can serve a loss."""

from collections.abc import Sequence

from schemas.errors import ConfigError
from schemas.spec import RecordSpec
from trainer.config.train import LossConfig


def check_loss(loss: LossConfig, record: RecordSpec) -> None:
    """Raises a ConfigError if labels of this record cannot serve the loss; see `effective_kind`."""
    for _, objective in loss.objectives():
        effective_kind(objective, record)


def effective_kind(loss: LossConfig, record: RecordSpec) -> str:
    """The objective that a loss without a mix computes on labels of this record.

    This is ``loss.kind``, with one exception: above the temperature of the draws, the weights of
    forward_kl are unbounded, so ghost replaces it if ``loss.approximate_temperature`` is set.

    Raises:
        ConfigError: the loss needs a teacher but the labels are tokens only; it needs draws but
            the labels have none; its temperature is not stored; or its temperature exceeds that of
            the draws and ``loss.approximate_temperature`` is not set.
    """
    if loss.kind == "hard":
        return loss.kind
    if record.kind == "tokens":
        raise ConfigError(
            f'loss.kind = "{loss.kind}" needs a teacher\'s labels, but the label set has '
            'record.kind = "tokens"; use loss.kind = "hard" or a label set with a teacher'
        )
    if loss.kind == "forward_kl" and not record.has_draws:
        raise ConfigError(
            f'loss.kind = "forward_kl" needs labels with draws (record.kind "sampled" or '
            f'"threshold"), but the label set has record.kind = "{record.kind}"; use '
            'loss.kind = "ghost" for an exact head'
        )
    if loss.temperature != 1.0:
        temperature_column(record.temperatures, loss.temperature)
    if loss.kind != "forward_kl" or loss.temperature <= record.drawn_at:
        return loss.kind
    if not loss.approximate_temperature:
        served = [t for t in (1.0, *record.temperatures) if t <= record.drawn_at]
        raise ConfigError(
            f"loss.temperature = {loss.temperature} is above {record.drawn_at}, the temperature "
            'that these labels were drawn at, so the weights of loss.kind = "forward_kl" are '
            f"unbounded; it is exact at {_listed(served)}. Choose one of those, label again with "
            f"record.draw_temperature = {loss.temperature}, or set loss.approximate_temperature = "
            "true to use the ghost objective with the exact tail mass"
        )
    return "ghost"


def approximation(loss: LossConfig, record: RecordSpec) -> str:
    """A note for the log and the model card if an objective is approximated; else empty."""
    parts = [objective for _, objective in loss.objectives()]
    if all(effective_kind(objective, record) == objective.kind for objective in parts):
        return ""
    return (
        f"loss.kind = forward_kl at temperature {loss.temperature:g}, on labels drawn at "
        f"{record.drawn_at:g}: approximated by the ghost objective with the exact tail mass at "
        f"{loss.temperature:g} (loss.approximate_temperature), which is biased"
    )


def temperature_column(stored: Sequence[float], temperature: float) -> int:
    """Index of ``temperature`` among the stored temperatures, the columns of ``lse``.

    Raises:
        ConfigError: the temperature is not stored.
    """
    if temperature in stored:
        return stored.index(temperature)
    raise ConfigError(
        f"loss.temperature = {temperature} cannot be computed from these labels, which serve "
        f"{_listed([1.0, *stored])}; choose one of those, or label again with {temperature} in "
        "record.temperatures"
    )


def _listed(temperatures: Sequence[float]) -> str:
    return ", ".join(str(t) for t in sorted(set(temperatures)))
