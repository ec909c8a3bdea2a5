"""The student of both examples: a small Llama with random weights, as in `examples/demo`."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

TOKENIZER = Path(__file__).parents[1] / "teacher"


def make_student(
    tokenizer: str | Path, hidden_size: int = 128
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """A new student for a tokenizer, and that tokenizer. Any other causal model works as well."""
    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config), words
