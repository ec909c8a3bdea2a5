"""The fused head under ZeRO-3 with two ranks, tied and untied, against plain torch on one."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from schemas.config import StrictModel
from tests.support.distillation_oracle import random_targets
from tests.support.rank_pool import run_on_ranks
from trainer.config.train import LossConfig, TrainConfig
from trainer.losses.targets import SparseTargets
from trainer.student.build import StudentWithHead

RANKS, STEPS, VOCAB, TOKENS = 2, 3, 64, 24
LOSS = LossConfig(kind="ghost", alpha=0.7, chunk_tokens=5)


def make_student(tied: bool) -> StudentWithHead:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return StudentWithHead(LlamaForCausalLM(config))


def make_batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor, SparseTargets]:
    """Tokens, position ids and targets; ranks have different numbers of labels."""
    rng = np.random.default_rng(100 * step + rank)
    tokens = torch.from_numpy(rng.integers(0, VOCAB, (1, TOKENS)))
    positions = torch.cat([torch.arange(10), torch.arange(TOKENS - 10)])[None]
    return tokens, positions, random_targets(rng, 8 + 9 * rank, VOCAB, TOKENS)


def train_config(num_workers: int) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "run": "unused",
            "view": "unused",
            "student": {"config": {"model_type": "llama"}, "tokenizer": "unused"},
            "data": {"max_tokens": TOKENS, "sequences_per_step": num_workers, "steps": STEPS},
            "optimizer": {"lr": 1e-2},
            "deepspeed": {"zero_stage": 3, "gradient_clipping": 0.0},
            "ray": {"num_workers": num_workers},
        }
    )


class Outcome(StrictModel):
    """Of one run: the loss of each step, and the head and the embedding afterwards."""

    losses: list[float]
    head: list[list[float]]
    embedding: list[list[float]]


def outcome(losses: list[float], student: StudentWithHead) -> Outcome:
    model = student.model
    return Outcome(
        losses=losses,
        head=model.lm_head.weight.tolist(),
        embedding=model.get_input_embeddings().weight.tolist(),
    )


def total_weight(step: int) -> float:
    return sum(float(make_batch(step, rank)[2].weights.sum()) for rank in range(RANKS))


def on_one_process(tied: bool) -> Outcome:
    from trainer.engine.deepspeed_engine import build_optimizer

    student = make_student(tied)
    optimizer = build_optimizer(student, train_config(1).optimizer, fused=False)
    losses = []
    for step in range(STEPS):
        total = sum(student(*make_batch(step, rank), LOSS)[0] for rank in range(RANKS))
        mean = total / total_weight(step)
        mean.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(mean.detach()))
    return outcome(losses, student)


def on_this_rank(tied: bool) -> Outcome:
    import deepspeed

    from trainer.engine.deepspeed_engine import build_engine

    rank = int(os.environ["RANK"])
    engine = build_engine(make_student(tied), train_config(RANKS))
    losses = []
    for step in range(STEPS):
        total, _ = engine(*make_batch(step, rank), LOSS)
        engine.backward(RANKS * total / total_weight(step), scale_wrt_gas=False)
        engine.step()
        everywhere = total.detach().clone()
        torch.distributed.all_reduce(everywhere)
        losses.append(float(everywhere) / total_weight(step))
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return outcome(losses, engine.module)


def train_both(out: Path) -> None:
    """What every rank does; rank 0 writes the outcomes."""
    outcomes = {str(tied): on_this_rank(tied).model_dump() for tied in (True, False)}
    if int(os.environ["RANK"]) == 0:
        out.write_text(json.dumps(outcomes))


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    out = tmp_path_factory.mktemp("zero3") / "outcomes.json"
    assert run_on_ranks(train_both, RANKS, out) == [0] * RANKS
    return {k: Outcome.model_validate(v) for k, v in json.loads(out.read_text()).items()}


@pytest.mark.parametrize("tied", [True, False])
def test_zero3_trains_as_one_process_does(distributed, tied):
    expected, found = on_one_process(tied), distributed[str(tied)]
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    np.testing.assert_allclose(found.head, expected.head, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.embedding, expected.embedding, rtol=1e-4, atol=1e-5)
    assert (found.head == found.embedding) == tied
