"""Teachers with models of their own: one engine after the other, each closed before the next."""

from pathlib import Path

import numpy as np
import pytest
import torch

from labeler.config import TeacherConfig
from labeler.teachers.factory import make_teacher
from schemas.errors import TeacherError
from schemas.record.spans import span_targets
from schemas.spec import GenerationSpec, RecordSpec
from tests.support.teacher_requests import (
    CONTEXT,
    RECORD,
    VOCAB_SIZE,
    assert_same,
    assert_same_draws,
    config,
    label,
    labelled,
    make_rows,
)


def make_markov_model(folder: Path, logits: torch.Tensor) -> None:
    """Writes a Llama whose next-token logits are ``logits[last token]``, whatever came before it.

    Attention and MLP add nothing; the embedding of token i is the i-th unit vector, which the
    final norm multiplies by sqrt(H), and the head is the table of logits divided by that.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    vocab_size, hidden_size = len(logits), 128
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            bos_token_id=None,
            eos_token_id=7,
            rms_norm_eps=1e-12,
            tie_word_embeddings=False,
        )
    ).float()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(hidden_size)[:vocab_size])
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, :vocab_size] = logits.T / hidden_size**0.5
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def markov(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A model of 100 tokens, where (3 i + 1) % 100 likely follows i, and its log-probabilities."""
    size = 100
    rng = np.random.default_rng(1)
    table = rng.normal(size=(size, size))
    table[np.arange(size), (3 * np.arange(size) + 1) % size] += 12.0
    table[np.arange(size), (np.arange(size) + 5) % size] += 4.0
    folder = tmp_path_factory.mktemp("markov")
    make_markov_model(folder, torch.from_numpy(table).float())
    table = table.astype(np.float32).astype(np.float64)
    return folder, table - np.logaddexp.reduce(table, axis=1, keepdims=True)


@pytest.mark.parametrize("backend", ["vllm", "transformers"])
def test_teacher_aligns_labels_with_tokens(markov: tuple[Path, np.ndarray], backend: str) -> None:
    folder, logprobs = markov
    tokens, spans = make_rows(len(logprobs))
    # Chains of likely tokens too: shifted by one, these would be unlikely.
    tokens.append(np.array([(3**i * 2 + (3**i - 1) // 2) % 100 for i in range(30)], dtype=np.int32))
    spans.append(np.array([1, 30], dtype=np.int32))
    teacher = make_teacher(config(folder, backend), RECORD)
    results = label(teacher, tokens, spans)
    for row, result in enumerate(results):
        labels, targets = labelled(result), span_targets(spans[row])
        expected = logprobs[tokens[row][targets - 1]]
        order = np.argsort(-expected, axis=1)
        np.testing.assert_array_equal(labels.entry_ids, order[:, : RECORD.k])
        sorted_logprobs = np.take_along_axis(expected, order, axis=1)
        np.testing.assert_allclose(
            labels.entry_logprobs, sorted_logprobs[:, : RECORD.k], rtol=0, atol=1e-4
        )
        here = np.arange(len(targets)), tokens[row][targets]
        np.testing.assert_allclose(labels.target_logprob, expected[here], rtol=0, atol=1e-4)
        rank = 1 + (expected > expected[here][:, None]).sum(axis=1)
        np.testing.assert_array_equal(labels.target_rank, rank)
        tail = np.logaddexp.reduce(sorted_logprobs[:, RECORD.k :], axis=1)
        np.testing.assert_allclose(labels.tail_logmass, tail, rtol=0, atol=1e-4)
        entropy = -(np.exp(expected) * expected).sum(axis=1)
        np.testing.assert_allclose(labels.entropy, entropy, rtol=0, atol=1e-4)
        for column, temperature in enumerate(RECORD.temperatures):
            lse = np.logaddexp.reduce(expected / temperature, axis=1)
            np.testing.assert_allclose(labels.lse[:, column], lse, rtol=0, atol=1e-4)
    # The sequence 2, 7, 22, ... is the most probable one; 7 also ends responses.
    greedy = GenerationSpec(temperature=0.0, max_tokens=8)
    responses = teacher.generate([np.array([3]), np.array([2])], greedy, [[0], [0]])
    assert [[r.tolist() for r in row] for row in responses] == [
        [[10, 31, 94, 83, 50, 51, 54, 63]],
        [[7]],
    ]
    teacher.close()


def make_gemma(folder: Path) -> None:
    """A model whose logits are capped: what the head gives is not what the softmax gets."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    settings = Gemma2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=CONTEXT,
        final_logit_softcapping=3.0,
        attn_logit_softcapping=2.0,
        initializer_range=0.1,
        eos_token_id=1,
    )
    Gemma2ForCausalLM(settings).float().save_pretrained(folder)


def test_teacher_applies_softcap_and_scale(tmp_path: Path) -> None:
    from tests.support.tiny_model import make_tokenizer

    make_gemma(tmp_path)
    make_tokenizer(tmp_path)
    tokens, spans = make_rows()
    results = []
    for backend in ("vllm", "transformers"):
        teacher = make_teacher(config(tmp_path, backend), RECORD)
        results.append(label(teacher, tokens, spans))
        teacher.close()
    for one, other in zip(*results, strict=True):
        assert_same(labelled(one), labelled(other), 2e-4)
        # Capped at 3, no two log-probabilities are more than 6 apart.
        assert np.ptp(labelled(one).entry_logprobs) < 6.0


def test_teacher_computes_a_float32_head_over_a_bfloat16_body(tiny_model_dir: Path) -> None:
    tokens, spans = make_rows()
    distinct = {}
    for head_dtype in ("auto", "float32"):
        teacher = make_teacher(
            config(tiny_model_dir, dtype="bfloat16", head_dtype=head_dtype), RECORD
        )
        labels = labelled(label(teacher, tokens[4:5], spans[4:5])[0])
        teacher.close()
        falls = np.diff(labels.entry_logprobs, axis=1)
        assert (falls <= 0).all()
        # Equal logits are ordered by id, so that they are the same in every run.
        assert (np.diff(labels.entry_ids, axis=1)[falls == 0] > 0).all()
        distinct[head_dtype] = (falls < 0).mean()
    assert distinct["auto"] < 0.99
    assert distinct["float32"] > 0.99


def test_engine_in_its_own_process_gives_the_same_labels(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    record = RecordSpec(kind="sampled", draws=12, temperatures=(0.5, 2.0))
    tokens, spans = make_rows()
    teacher = make_teacher(config(tiny_model_dir), record)
    ours = label(teacher, tokens, spans)
    assert teacher.provenance()["in_process"] is False
    teacher.close()
    reference = make_teacher(config(tiny_model_dir, "transformers"), record)
    theirs = label(reference, tokens, spans)
    assert_same_draws([*map(labelled, ours)], [*map(labelled, theirs)], 1e-4, 0.01)


def test_config_refuses_engine_options_that_are_set_elsewhere(tiny_model_dir: Path) -> None:
    with pytest.raises(TeacherError, match=r"engine\.dtype cannot be set: use teacher\.dtype"):
        make_teacher(config(tiny_model_dir, engine={"dtype": "float16"}), RECORD)


def test_engine_that_does_not_start_says_why(tiny_model_dir: Path) -> None:
    with pytest.raises(TeacherError, match="vLLM does not start with"):
        make_teacher(config(tiny_model_dir, engine={"no_such_option": 1}), RECORD)
    with pytest.raises(TeacherError, match="transformers cannot load"):
        make_teacher(config(tiny_model_dir, "transformers", engine={"no_such": 1}), RECORD)


def test_make_teacher_needs_a_backend(tiny_model_dir: Path) -> None:
    with pytest.raises(TeacherError, match="has no teacher"):
        make_teacher(TeacherConfig(backend="none", tokenizer=str(tiny_model_dir)), RECORD)
