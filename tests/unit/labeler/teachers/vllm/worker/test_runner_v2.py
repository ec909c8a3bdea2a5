"""The label head of the V2 model runner: its bookkeeping over steps, and the names it relies on."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from labeler.label_head.position_labels import label_logits
from labeler.teachers.draw_uniforms import row_uniforms
from labeler.teachers.protocol import RowLabels
from labeler.teachers.vllm.label_requests import AUDIT_RATE, ROW_KEY, SPANS, row_labels
from labeler.teachers.vllm.worker.runner_v2 import LabelHeadV2, incompatibility, install_into
from schemas.record.spans import span_targets
from schemas.spec import RecordSpec

VOCAB = 50
HIDDEN = 8
SLOTS = 8
CONTEXT = 64
SEED = 3


def worker() -> Any:
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

    return PromptLogprobsWorker(SLOTS, torch.device("cpu"))


@dataclass
class Request:
    """One prompt, the hidden states that a model would compute for it, and where it is."""

    name: str
    slot: int
    tokens: np.ndarray
    spans: np.ndarray
    hidden: torch.Tensor
    done: int = 0
    key: np.ndarray = field(default_factory=lambda: np.arange(16, dtype=np.uint8))

    def params(self) -> Any:
        arguments = {
            SPANS: self.spans.tolist(),
            ROW_KEY: self.key.tobytes().hex(),
            AUDIT_RATE: 0.25,
        }
        return SimpleNamespace(
            prompt_logprobs=1, prompt_logprob_token_ids=None, extra_args=arguments
        )


@dataclass
class Runner:
    """As much of a V2 model runner as the label head sees."""

    prompt_logprobs_worker: Any
    head: torch.Tensor
    is_last_pp_rank: bool = True
    model: Any = None
    all_token_ids: torch.Tensor = field(
        default_factory=lambda: torch.zeros(SLOTS, CONTEXT, dtype=torch.int32)
    )
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(SLOTS, np.int32))
    model_config: Any = field(default_factory=lambda: SimpleNamespace(get_vocab_size=lambda: VOCAB))

    def add(self, request: Request) -> None:
        request.done = 0
        self.prompt_logprobs_worker.add_request(request.name, request.slot, request.params())
        self.all_token_ids[request.slot, : len(request.tokens)] = torch.from_numpy(request.tokens)
        self.lengths[request.slot] = len(request.tokens)

    def step(self, scheduled: list[tuple[Request, int]]) -> dict[str, Any]:
        """Prefills so many tokens of each request."""
        counts = np.array([count for _, count in scheduled])
        starts = np.array([request.done for request, _ in scheduled])
        slots = np.array([request.slot for request, _ in scheduled])
        batch = SimpleNamespace(
            req_ids=[request.name for request, _ in scheduled],
            idx_mapping_np=slots,
            num_scheduled_tokens=counts,
            num_computed_prefill_tokens_np=starts,
            prefill_len_np=self.lengths[slots],
            query_start_loc_np=np.concatenate([[0], np.cumsum(counts)]),
        )
        hidden = [request.hidden[request.done : request.done + n] for request, n in scheduled]
        padding = torch.full((3, HIDDEN), torch.nan)  # runners pad their batches
        finished: dict[str, Any] = self.prompt_logprobs_worker.compute_prompt_logprobs(
            lambda states: states @ self.head.T,
            torch.cat([*hidden, padding]),
            batch,
            self.all_token_ids,
            torch.from_numpy(starts),
            self.lengths,
        )
        for request, count in scheduled:
            request.done += count
        return finished


@pytest.fixture
def runner() -> Runner:
    print(f"seed {SEED}")
    torch.manual_seed(SEED)
    return Runner(worker(), torch.randn(VOCAB, HIDDEN))


def request(name: str, slot: int, length: int, spans: list[int]) -> Request:
    rng = np.random.default_rng(slot)
    tokens = rng.integers(0, VOCAB, length, dtype=np.int32)
    key = rng.integers(0, 256, 16, dtype=np.uint8)
    return Request(
        name, slot, tokens, np.array(spans, np.int32), torch.randn(length, HIDDEN), key=key
    )


def expected(one: Request, runner: Runner, record: RecordSpec) -> Any:
    targets = span_targets(one.spans)
    uniforms = row_uniforms(record, one.key.tobytes(), targets)
    logits = one.hidden[torch.from_numpy(targets) - 1] @ runner.head.T
    return label_logits(logits, torch.from_numpy(one.tokens[targets]), record, uniforms)


def check(found: Any, one: Request, runner: Runner, record: RecordSpec) -> None:
    output = SimpleNamespace(prompt_logprobs=found)
    count = len(span_targets(one.spans))
    labels: RowLabels = row_labels(output, record, count, one.key, 0.25)
    true = expected(one, runner, record)
    width = labels.entry_ids.shape[1]
    np.testing.assert_array_equal(labels.entry_ids, true.entry_ids[:, :width])
    for name in ("target_rank", "head_len", "tail_len"):
        np.testing.assert_array_equal(getattr(labels, name), getattr(true, name))
    for name in ("tail_logmass", "target_logprob", "entropy"):
        np.testing.assert_allclose(getattr(labels, name), getattr(true, name), atol=1e-5)
    assert labels.audit is not None
    assert len(labels.audit.labels)


@pytest.mark.parametrize(
    "record", [RecordSpec(kind="topk", k=6), RecordSpec(kind="threshold", tau=0.05)]
)
def test_runner_v2_labels_prompts_of_one_or_several_steps_and_preempted_ones(
    runner: Runner, record: RecordSpec
) -> None:
    assert install_into(runner, record) == ""
    short = request("short", 1, 9, [1, 9])
    long = request("long", 4, 40, [1, 5, 12, 31, 35, 40])
    for one in (short, long):
        runner.add(one)
    first = runner.step([(long, 13), (short, 9)])
    assert list(first) == ["short"]
    check(first["short"], short, runner, record)
    runner.prompt_logprobs_worker.remove_request("long")  # preempted, and again from its start
    runner.add(long)
    assert runner.step([(long, 1)]) == {}
    assert runner.step([(long, 20)]) == {}
    last = runner.step([(long, 19)])
    check(last["long"], long, runner, record)
    assert runner.step([(short, 1), (long, 1)]) == {}  # both decode now


def test_runner_v2_takes_another_record(runner: Runner) -> None:
    install_into(runner, RecordSpec(kind="topk", k=6))
    record = RecordSpec(kind="topk", k=3)
    assert install_into(runner, record) == ""
    assert isinstance(runner.prompt_logprobs_worker.compute_prompt_logprobs.__self__, LabelHeadV2)
    one = request("one", 0, 12, [3, 12])
    runner.add(one)
    check(runner.step([(one, 12)])["one"], one, runner, record)


def test_installed_vllm_has_the_names_that_runner_v2_uses() -> None:
    assert incompatibility(worker()) == ""
    other = worker()
    other.add_request = lambda req_id, sampling_params: None
    assert "add_request takes ('req_id', 'sampling_params')" in incompatibility(other)
    head = torch.zeros(VOCAB, HIDDEN)
    assert install_into(Runner(None, head), RecordSpec()) == "it labels no prompts"
    assert install_into(Runner(None, head, is_last_pp_rank=False), RecordSpec()) == ""
