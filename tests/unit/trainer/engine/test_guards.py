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
def test_what_is_not_finite_always_stops(spikes: str, value: float) -> None:
    for check in (lambda: guard(spikes).check_loss(7, value, 2.0),
                  lambda: guard(spikes).check_gradient(7, value)):  # fmt: skip
        with pytest.raises(BadStep) as error:
            check()
        assert error.value.step == 7
        assert error.value.median is None


def test_a_spike_is_measured_against_the_median_of_the_window() -> None:
    mine = guard()
    assert [mine.check_loss(step, 2.0, 1.0) for step in range(MIN_RECENT_STEPS)] == [
        ""
    ] * MIN_RECENT_STEPS
    assert mine.check_loss(10, 11.9, 2.0) == ""
    assert "step 11: loss 6.2, 3.1 times" in mine.check_loss(11, 6.2, 1.0)
    assert len(mine.recent[LOSS]) == 10


def test_the_first_steps_are_no_spikes() -> None:
    mine = guard("stop")
    assert [mine.check_gradient(step, 10.0**step) for step in range(MIN_RECENT_STEPS)] == [
        ""
    ] * MIN_RECENT_STEPS


def test_a_guard_goes_on_where_another_stood() -> None:
    first = guard("stop")
    for step in range(20):
        first.check_gradient(step, 1.0 + 0.01 * step)
    for mine in (first, guard("stop", first.recent)):
        with pytest.raises(BadStep) as error:
            mine.check_gradient(20, 9.0)
        assert error.value.median == pytest.approx(1.145)


def test_losses_around_zero_give_nothing_to_compare_with() -> None:
    mine = guard("stop")
    for step in range(15):
        mine.check_loss(step, (-1.0) ** step * 1e-9, 1.0)
    assert mine.check_loss(15, 3.0, 1.0) == "" or mine.recent[LOSS][-1] == 3.0
