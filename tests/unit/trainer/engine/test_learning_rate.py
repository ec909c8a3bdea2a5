"""The learning rate as a function of the step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.train import ScheduleConfig
from trainer.engine.learning_rate import lr_factor, num_warmup_steps


def factors(num_steps: int, **fields: object) -> list[float]:
    schedule = ScheduleConfig.model_validate(fields)
    return [lr_factor(schedule, step, num_steps) for step in range(num_steps)]


def test_linear_with_warmup() -> None:
    assert factors(6, kind="linear", warmup_steps=2, min_lr_ratio=0.0) == pytest.approx(
        [0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    )


def test_cosine_passes_its_middle_half_way() -> None:
    assert factors(5, kind="cosine", min_lr_ratio=0.2) == pytest.approx(
        [1.0, 0.8828427, 0.6, 0.3171573, 0.2]
    )


def test_constant_stays() -> None:
    assert factors(4, kind="constant", warmup_steps=2) == [0.5, 1.0, 1.0, 1.0]


def test_warmup_as_a_share_of_the_run() -> None:
    assert num_warmup_steps(ScheduleConfig(warmup_ratio=0.1), 200) == 20


def test_one_step_has_the_full_rate() -> None:
    assert factors(1, kind="cosine") == [1.0]


@given(
    kind=st.sampled_from(["cosine", "linear", "constant"]),
    warmup_steps=st.integers(0, 50),
    min_lr_ratio=st.floats(0.0, 1.0),
    num_steps=st.integers(1, 100),
)
def test_rises_to_the_peak_then_falls_to_the_floor(
    kind: str, warmup_steps: int, min_lr_ratio: float, num_steps: int
) -> None:
    curve = factors(num_steps, kind=kind, warmup_steps=warmup_steps, min_lr_ratio=min_lr_ratio)
    peak = curve.index(max(curve))
    assert curve[: peak + 1] == sorted(curve[: peak + 1])
    assert curve[peak:] == sorted(curve[peak:], reverse=True)
    assert max(curve) == 1.0
    if kind != "constant" and num_steps > max(warmup_steps, 1):
        assert curve[-1] == pytest.approx(min_lr_ratio)
