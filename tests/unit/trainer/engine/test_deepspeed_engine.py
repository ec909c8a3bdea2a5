"""The engine that DeepSpeed builds trains what it was given, as the plain optimizer would."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.support.training_runs import make_config
from trainer.config.train import TrainConfig
from trainer.engine.deepspeed_engine import build_engine, build_optimizer


# Of the module, not of a test: DeepSpeed keeps the first process group that it meets.
@pytest.fixture(autouse=True, scope="module")
def _one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    rendezvous = tmp_path_factory.mktemp("ranks") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("DS_ACCELERATOR", os.environ.get("DS_ACCELERATOR", "cpu"))
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
            patch.setenv(name, value)
        yield
    dist.destroy_process_group()


def config(stage: int, precision: str) -> TrainConfig:
    return make_config(
        Path("run"),
        "view",
        "tokenizer",
        data={"sequences_per_step": 1},
        optimizer={"lr": 1e-2, "weight_decay": 0.5},
        deepspeed={"zero_stage": stage, "precision": precision, "gradient_clipping": 0.0},
        ray={"use_gpu": torch.cuda.is_available()},
    )


def step(engine: Any, inputs: torch.Tensor) -> None:
    engine.backward(engine(inputs.to(engine.device)).float().square().sum(), scale_wrt_gas=False)
    engine.step()


@pytest.mark.parametrize("stage", [0, 1])
def test_first_step_in_bf16_is_the_first_of_the_optimizer(stage: int) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Linear(8, 8), torch.randn(4, 8).bfloat16()
    job = config(stage, "bf16")
    masters = nn.Linear(8, 8)
    masters.load_state_dict({k: v.bfloat16().float() for k, v in model.state_dict().items()})
    expected = build_optimizer(masters, job.optimizer, fused=False)
    engine = build_engine(model, job)
    for _ in range(2):
        half = nn.Linear(8, 8).bfloat16()
        half.load_state_dict(masters.state_dict())
        half(inputs).float().square().sum().backward()
        for master, rounded in zip(masters.parameters(), half.parameters(), strict=True):
            master.grad = rounded.grad.float()
        expected.step()
        step(engine, inputs)
    states = [s for s in engine.optimizer.optimizer.state.values() if "step" in s]
    assert {float(state["step"]) for state in states} == {2.0}
    trained = [p for group in engine.optimizer.optimizer.param_groups for p in group["params"]]
    found = torch.cat([p.detach().flatten().cpu() for p in trained])[: 8 * 8 + 8]
    wanted = torch.cat([p.detach().flatten() for p in masters.parameters()])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", [0, 3])
def test_fp32_training_widens_weights_of_any_dtype(stage: int) -> None:
    torch.manual_seed(0)
    frozen, trained = nn.Linear(8, 8).bfloat16(), nn.Linear(8, 8, dtype=torch.bfloat16)
    frozen.requires_grad_(False)
    engine = build_engine(Adapted(frozen, trained), config(stage, "fp32"))
    assert trained.weight.dtype == torch.float32
    assert frozen.weight.dtype == torch.bfloat16
    step(engine, torch.randn(4, 8))


class Adapted(nn.Module):
    """A frozen layer with something beside it that is trained."""

    def __init__(self, base: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.base, self.adapter = base, adapter

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.base(inputs.bfloat16()) + self.adapter(inputs)
        return result
