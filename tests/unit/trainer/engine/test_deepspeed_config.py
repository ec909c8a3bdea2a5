"""What DeepSpeed is told, and that nothing else may be told it."""

from typing import Any

import pytest

from schemas.errors import ConfigError
from trainer.config.train import TrainConfig
from trainer.data.row_order import num_micro_batches
from trainer.engine.deepspeed_config import build_deepspeed_config

WORLD = 1


def config(
    lanes: int = 8,
    micro_batch_size: int = 1,
    num_workers: int = 1,
    native: dict[str, Any] | None = None,
    **deepspeed: Any,
) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "run": "r",
            "view": "v",
            "student": {"path": "p"},
            "data": {
                "max_tokens": 8,
                "sequences_per_step": lanes,
                "micro_batch_size": micro_batch_size,
                "steps": 1,
            },
            "ray": {"num_workers": num_workers},
            "deepspeed": {**deepspeed, "native": native or {}},
        }
    )


@pytest.mark.parametrize(
    ("lanes", "micro_batch_size", "num_workers", "expected"),
    [(8, 1, 1, 8), (8, 2, 2, 2), (8, 3, 2, 2), (5, 1, 2, 3), (1, 4, 3, 1)],
)
def test_gradient_accumulation_is_derived(
    lanes: int, micro_batch_size: int, num_workers: int, expected: int
) -> None:
    job = config(lanes, micro_batch_size, num_workers)
    assert num_micro_batches(job.data, num_workers) == expected
    native = build_deepspeed_config(job, 1000, num_workers)
    assert native["gradient_accumulation_steps"] == expected
    assert native["train_batch_size"] == expected * micro_batch_size * num_workers


def test_deepspeed_config_writes_every_changed_default() -> None:
    native = build_deepspeed_config(config(gradient_clipping=0.5, precision="bf16"), 1000, WORLD)
    assert native["gradient_clipping"] == 0.5
    assert native["bf16"] == {"enabled": True, "check_grad_overflow": False}


@pytest.mark.parametrize(
    ("precision", "stage", "dtype"),
    [("fp32", 0, "fp32"), ("bf16", 0, "bf16"), ("bf16", 1, "fp32"), ("bf16", 3, "fp32")],
)
def test_gradients_accumulate_in_float32_where_the_stage_allows(
    precision: str, stage: int, dtype: str
) -> None:
    native = build_deepspeed_config(config(precision=precision, zero_stage=stage), 1000, WORLD)
    assert native["data_types"]["grad_accum_dtype"] == dtype


def test_native_options_pass_through_and_change_defaults() -> None:
    offload = {"device": "cpu"}
    job = config(native={"zero_optimization": {"offload_optimizer": offload, "overlap_comm": True}})
    zero = build_deepspeed_config(job, 1000, WORLD)["zero_optimization"]
    assert zero["stage"] == 0
    assert zero["offload_optimizer"] == offload
    assert zero["overlap_comm"] is True


def test_native_option_that_agrees_passes() -> None:
    native = {"zero_optimization": {"stage": 2}, "train_batch_size": "auto"}
    build_deepspeed_config(config(zero_stage=2, native=native), 1000, WORLD)


@pytest.mark.parametrize(
    ("native", "theirs", "ours"),
    [
        (
            {"zero_optimization": {"stage": 2}},
            "zero_optimization.stage = 2",
            "deepspeed.zero_stage",
        ),
        ({"gradient_clipping": 0.1}, "gradient_clipping = 0.1", "deepspeed.gradient_clipping"),
        ({"train_batch_size": 3}, "train_batch_size = 3", "data.sequences_per_step"),
        ({"bf16": {"enabled": True}}, "bf16.enabled = True", "deepspeed.precision"),
        ({"amp": {"enabled": True}}, "native.amp", "deepspeed.precision"),
    ],
)
def test_contradiction_names_both_sides(native: dict[str, Any], theirs: str, ours: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_deepspeed_config(config(native=native), 1000, WORLD)
    assert theirs in str(error.value)
    assert ours in str(error.value)


def test_buckets_are_no_larger_than_the_model() -> None:
    zero = build_deepspeed_config(config(zero_stage=2), 100_000, WORLD)["zero_optimization"]
    assert zero["reduce_bucket_size"] == 100_000


ADAGRAD = {"type": "Adagrad", "params": {"lr": 0.01}}


def both(section: str, values: dict[str, Any], native: dict[str, Any]) -> TrainConfig:
    content = config(native=native).model_dump(mode="json")
    content[section] = {**content[section], **values}
    return TrainConfig.model_validate(content)


def test_native_optimizer_reaches_deepspeed_and_a_scheduler_does_not() -> None:
    native = {"optimizer": ADAGRAD, "scheduler": {"type": "WarmupLR", "params": {}}}
    built = build_deepspeed_config(config(native=native), 1000, WORLD)
    assert built["optimizer"] == ADAGRAD
    assert "scheduler" not in built


@pytest.mark.parametrize(
    ("section", "values", "native", "message"),
    [
        (
            "optimizer",
            {"lr": 0.5},
            {"optimizer": ADAGRAD},
            r"replaces \[optimizer\].* lr",
        ),
        (
            "schedule",
            {"warmup_steps": 5},
            {"scheduler": {"type": "WarmupLR"}},
            r"replaces \[schedule\].* warmup_steps",
        ),
        ("optimizer", {}, {"optimizer": {"type": "OneBitAdam"}}, "'OneBitAdam' is not supported"),
        ("optimizer", {}, {"optimizer": {"type": "SGD", "params": {}}}, r"params\.lr = None"),
        ("optimizer", {}, {"optimizer": {"type": "SGD", "lr": 1.0}}, r"found \['lr'\]"),
        ("schedule", {}, {"scheduler": {"type": "Cosine"}}, "expected one of WarmupLR"),
        ("schedule", {}, {"scheduler": {"type": "OneCycle"}}, "cycle_momentum = false"),
    ],
)
def test_native_optimizer_and_scheduler_are_checked(
    section: str, values: dict[str, Any], native: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_deepspeed_config(both(section, values, native), 1000, WORLD)


def test_only_what_deepspeed_converts_goes_on_with_other_workers() -> None:
    from trainer.checkpoints.restore import check_universal

    check_universal("AdamW", saved_by=2)  # torch's own
    check_universal("adam", saved_by=2)
    with pytest.raises(ConfigError, match=r"optimizer is Lion.*ray\.num_workers = 2"):
        check_universal("Lion", saved_by=2)
