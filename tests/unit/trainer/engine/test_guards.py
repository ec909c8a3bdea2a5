"""What counts as a bad step, and that an interrupted run is guarded as one that was not."""

import math

import pytest

from trainer.config.train import GuardConfig
from trainer.engine.guards import LOSS, MIN_RECENT_STEPS, BadStep, Guard


def guard(spikes: str = "warn", recent: dict[str, list[float]] | None = None) -> Guard:
    config = GuardConfig.model_validate({"spikes": spikes, "spike_factor": 3.0, "window_steps": 10})
    return Guard(config, recent or {})


@pytest.mark.parametrize("spikes", ["off", "warn", "stop"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_guard_stops_on_values_that_are_not_finite(spikes: str, value: float) -> None:
    for check in (lambda: guard(spikes).check_loss(7, value, 2.0),
                  lambda: guard(spikes).check_gradient(7, value)):  # fmt: skip
        with pytest.raises(BadStep) as error:
            check()
        assert error.value.step == 7
        assert error.value.median is None


def test_guard_measures_a_spike_against_the_windows_median() -> None:
    mine = guard()
    assert [mine.check_loss(step, 2.0, 1.0) for step in range(MIN_RECENT_STEPS)] == [
        ""
    ] * MIN_RECENT_STEPS
    assert mine.check_loss(10, 11.9, 2.0) == ""
    assert "step 11: loss 6.2, 3.1 times" in mine.check_loss(11, 6.2, 1.0)
    assert len(mine.recent[LOSS]) == 10


def test_guard_finds_no_spike_in_the_first_steps() -> None:
    mine = guard("stop")
    assert [mine.check_gradient(step, 10.0**step) for step in range(MIN_RECENT_STEPS)] == [
        ""
    ] * MIN_RECENT_STEPS


def test_guard_resumes_from_recent_values() -> None:
    first = guard("stop")
    for step in range(20):
        first.check_gradient(step, 1.0 + 0.01 * step)
    for mine in (first, guard("stop", first.recent)):
        with pytest.raises(BadStep) as error:
            mine.check_gradient(20, 9.0)
        assert error.value.median == pytest.approx(1.145)


@pytest.mark.parametrize("losses", [[1e-9, -1e-9] * 8, [-1.0] * 16], ids=["zero", "negative"])
def test_guard_finds_no_spike_over_a_median_of_zero_or_less(losses: list[float]) -> None:
    mine = guard()
    warnings = [mine.check_loss(step, loss, 1.0) for step, loss in enumerate([*losses, 3.0])]
    assert warnings == [""] * 17
