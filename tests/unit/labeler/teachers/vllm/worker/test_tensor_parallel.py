"""Labels made together by workers that each have a part of the vocabulary: two gloo processes."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from labeler.teachers.vllm.worker.tensor_parallel import rank_bounds, vocab_parallel_logits

SEED = 11

# One process of the group: argv is rank, world size, the file that they meet in.
WORKER = """
import sys
import numpy as np, torch, torch.distributed as dist
from labeler.label_head.audit_logits import audit_logits
from labeler.label_head.position_labels import label_logits
from labeler.teachers.draw_uniforms import row_uniforms
from labeler.teachers.vllm.packed_labels import pack
from labeler.teachers.vllm.worker.label_step import StepLabeler
from labeler.teachers.vllm.worker.tensor_parallel import VocabParallelLogits
from schemas.spec import RecordSpec

rank, world, meeting, seed = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
vocab, padded = 101, 104
width = padded // world
shard = VocabParallelLogits(
    lambda logits: logits[:, rank * width : (rank + 1) * width].contiguous(), dist.group.WORLD
)
records = [
    RecordSpec(kind="topk", k=7, temperatures=(2.0,)),
    RecordSpec(kind="topp", top_p=0.8, max_head=20),
    RecordSpec(kind="threshold", tau=0.03),
    RecordSpec(kind="sampled", draws=9, entropy=False),
]
for record in records:
    for count in (1, 2, 7, 40):
        generator = torch.Generator().manual_seed(seed + count)
        logits = 3 * torch.randn(count, padded, generator=generator)
        targets = torch.randint(0, vocab, (count,), generator=generator)
        audited = np.arange(count) % 5 == 3
        uniforms = row_uniforms(record, bytes(16), np.arange(count))
        labeler = StepLabeler(record, vocab, torch.device("cpu"), shard)
        packed, audits = labeler.label_positions(None, logits, targets, uniforms, audited)
        whole = logits[:, :vocab].contiguous()
        labels = label_logits(whole, targets, record, uniforms)
        for mine, alone in zip(packed, pack(labels, record), strict=True):
            torch.testing.assert_close(mine, alone, rtol=0, atol=1e-6)
        assert (audits is None) == (not audited.any())
        if audits is not None:
            at = torch.from_numpy(np.flatnonzero(audited))
            alone = audit_logits(whole[at], labels.entry_ids[at], labels.head_len[at])
            torch.testing.assert_close(audits, alone, rtol=0, atol=1e-6)
dist.destroy_process_group()
print("same")
"""


@pytest.mark.parametrize("world", [2])
def test_two_workers_make_the_labels_of_one(tmp_path: Path, world: int) -> None:
    print(f"seed {SEED}")
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(world), str(tmp_path / "m"), str(SEED)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    for process in started:
        out, errors = process.communicate(timeout=120)
        assert out.strip().endswith("same"), errors[-3000:]


@pytest.mark.parametrize(("count", "ranks"), [(1, 2), (7, 2), (8, 4), (3, 4), (100, 8)])
def test_every_position_is_of_one_share(count: int, ranks: int) -> None:
    bounds = rank_bounds(count, ranks)
    assert bounds[0] == 0
    assert bounds[-1] == count
    assert (np.diff(bounds) >= 0).all()
    assert np.diff(bounds).max() == -(-count // ranks)


class Head:
    """A head of which each of two workers has a part."""

    tp_size = 2
    weight = torch.arange(12.0).view(4, 3)


class Processor:
    """As vLLM's: gathers the logits of all workers unless it is told not to."""

    def forward(
        self, head: Head, hidden: torch.Tensor, bias: Any = None, skip_gather: bool = False
    ) -> torch.Tensor:
        own = hidden @ head.weight.T
        return own if skip_gather else torch.cat([own, own], dim=-1)

    __call__ = forward


def model_like(known: Any) -> Any:
    """A model with the method by which a class of vLLM's makes its logits."""
    head = Head()
    return type(
        "Model",
        (),
        {
            "compute_logits": known.compute_logits,
            "logits_processor": Processor(),
            "lm_head": head,
            "model": SimpleNamespace(embed_tokens=head),
        },
    )()


@pytest.fixture
def _two_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.distributed

    group = SimpleNamespace(device_group="the group")
    monkeypatch.setattr(vllm.distributed, "get_tp_group", lambda: group)


@pytest.mark.usefixtures("_two_workers")
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("gemma2", "Gemma2ForCausalLM"),
        ("llama", "LlamaForCausalLM"),
        ("qwen3", "Qwen3ForCausalLM"),
    ],
)
def test_vocab_parallel_logits_are_the_workers_part_of_the_models_own(
    module: str, name: str
) -> None:
    known = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
    model, hidden = model_like(known), torch.randn(5, 3)
    found = vocab_parallel_logits(model)
    assert found is not None
    assert found.group == "the group"
    part = found.local_logits(hidden)
    assert torch.equal(torch.cat([part, part], dim=-1), model.compute_logits(hidden))


class Masks:
    """Does something else to its logits, which a worker with a part of them cannot do."""

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = self.logits_processor(self.lm_head, hidden_states)
        logits[:, 7] = -1e9
        return logits


@pytest.mark.usefixtures("_two_workers")
def test_vocab_parallel_logits_are_refused_where_a_part_is_not_enough() -> None:
    from vllm.model_executor.models.llama import LlamaForCausalLM

    assert vocab_parallel_logits(model_like(Masks)) is None
    assert vocab_parallel_logits(SimpleNamespace()) is None
    alone = model_like(LlamaForCausalLM)
    assert vocab_parallel_logits(alone) is not None
    alone.lm_head.tp_size = 1
    assert vocab_parallel_logits(alone) is None
