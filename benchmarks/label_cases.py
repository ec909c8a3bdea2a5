"""The teachers that labelling is measured on, and the rows that they label."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.demo_labels import TEACHER, TokenRows, real_rows
from labeler.config import TeacherConfig
from labeler.corpus.windows import all_but_first
from labeler.teacher_model.identity import load_model_config
from schemas.spec import RecordSpec

K = 64
MODELS = ("demo", "wide")
MAX_TOKENS = 512

# Taus with which these teachers keep about 12 ids a label. At random, a distribution is so flat
# that almost every id is below tau: 1 / tau draws.
_TAUS = {"demo": 0.047, "wide": 1 / 12}

# The shape of a small teacher with the vocabulary of a large one: the head is a third of its body.
_WIDE = {
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
}


@dataclass(frozen=True)
class Shape:
    """What of a model decides the limits.

    Attributes:
        body_params: those that every token goes through: all but the embedding and the head.
    """

    hidden_size: int
    vocab_size: int
    body_params: int

    @property
    def gemm_limit(self) -> float:
        """Labelled over plain prefill tokens/s, if the product with the head were all there is."""
        return 1.0 / (1.0 + self.hidden_size * self.vocab_size / self.body_params)


def records(model: str) -> dict[str, RecordSpec]:
    """The kinds of record that are measured, by name."""
    return {
        f"topk_{K}": RecordSpec(kind="topk", k=K),
        "threshold_12": RecordSpec(kind="threshold", tau=_TAUS[model]),
    }


def make_folder(model: str, folder: Path) -> Path:
    """The folder of a model; the random one is made in ``folder``."""
    if model == "demo":
        return TEACHER
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        LlamaForCausalLM(LlamaConfig(**_WIDE)).save_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    return folder


def teacher_config(folder: Path) -> TeacherConfig:
    """The teacher in a folder, by vLLM; the stock paths may be asked for K candidates."""
    return TeacherConfig(
        backend="vllm",
        model=str(folder),
        max_model_len=MAX_TOKENS + 1,
        engine={"max_logprobs": K},
    )


def model_shape(config: TeacherConfig) -> Shape:
    """The shape of a model of the Llama family, from its configuration."""
    found = load_model_config(config).get_text_config()
    hidden, head = found.hidden_size, found.head_dim
    attention = 2 * hidden * head * (found.num_attention_heads + found.num_key_value_heads)
    layer = attention + 3 * hidden * found.intermediate_size
    return Shape(hidden, found.vocab_size, found.num_hidden_layers * layer)


def make_rows(model: str, num_tokens: int, row_tokens: int, vocab_size: int) -> TokenRows:
    """Held-out text for the demo's teacher; ids at random for one that is random itself."""
    if model == "demo":
        rows = real_rows(num_tokens)
        sizes = np.cumsum([len(tokens) for tokens in rows.token_ids])
        count = int(np.searchsorted(sizes, num_tokens)) + 1
        return rows[:count]
    random = np.random.default_rng(0)
    tokens = [
        random.integers(0, vocab_size, row_tokens).astype(np.int32)
        for _ in range(max(1, num_tokens // row_tokens))
    ]
    return TokenRows(tokens, [all_but_first(len(row)) for row in tokens])
