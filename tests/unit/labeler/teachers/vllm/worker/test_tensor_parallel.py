"""Labels made together by workers that each have a part of the vocabulary: two gloo processes."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

SEED = 11

# One process of the group: argv is rank, world size, the file that they meet in.
WORKER = """
import sys
import numpy as np, torch, torch.distributed as dist
from labeler.label_head.audit_logits import audit_logits
from labeler.label_head.position_labels import label_logits
from labeler.teachers.request_checks import row_uniforms
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
    from labeler.teachers.vllm.worker.tensor_parallel import rank_bounds

    bounds = rank_bounds(count, ranks)
    assert bounds[0] == 0
    assert bounds[-1] == count
    assert (np.diff(bounds) >= 0).all()
    assert np.diff(bounds).max() == -(-count // ranks)


class Processor:
    def forward(self, head: Any, hidden: Any, bias: Any = None, skip_gather: bool = False) -> Any:
        return (head, hidden, skip_gather)


def test_only_models_that_do_nothing_else_to_their_logits_are_sharded() -> None:
    from vllm.model_executor.models.gemma2 import Gemma2ForCausalLM
    from vllm.model_executor.models.llama import LlamaForCausalLM
    from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

    from labeler.teachers.vllm.worker.tensor_parallel import _plain_head

    for known in (LlamaForCausalLM, Qwen3ForCausalLM, Gemma2ForCausalLM):

        class Model:
            compute_logits = known.compute_logits
            logits_processor = Processor()
            lm_head = "a head"
            model = SimpleNamespace(embed_tokens="a head")

        assert _plain_head(Model()) == "a head", known

    class Masks:
        logits_processor = Processor()
        lm_head = "a head"

        def compute_logits(self, hidden_states: Any) -> Any:
            logits = self.logits_processor.forward(self.lm_head, hidden_states)
            logits[:, 7] = -1e9
            return logits

    assert _plain_head(Masks()) is None
    assert _plain_head(SimpleNamespace()) is None
