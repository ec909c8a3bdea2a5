"""What the whole test session shares: one small model folder, one Ray instance."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before any library that reads them is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# Clusters pass it on to their workers; see schemas.fault_points.
os.environ["TUTELAGE_FAULT_POINTS"] = tempfile.mkdtemp(prefix="tutelage-fault-points-")
atexit.register(shutil.rmtree, os.environ["TUTELAGE_FAULT_POINTS"], ignore_errors=True)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(folder: Path, vocab_size: int = 320) -> None:
    """Writes a byte-level BPE tokenizer trained on this repository's own tests."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=special[2:],
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def make_model(folder: Path, vocab_size: int = 320, seed: int = 0) -> None:
    """Writes a two-layer Llama with random float32 weights, wide enough for vLLM's CPU kernels."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: Llama of 320 tokens, its tokenizer (bos 0, eos 1) and chat template."""
    folder = tmp_path_factory.mktemp("tiny_model")
    make_tokenizer(folder)
    make_model(folder)
    return folder


@pytest.fixture(scope="session")
def vllm_server(
    tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """URL and API key of a ``vllm serve`` of the tiny model, one for the whole session."""
    import vllm_servers

    log = tmp_path_factory.mktemp("vllm_server") / "log.txt"
    with vllm_servers.vllm_server(tiny_model_dir, log) as url:
        yield url, vllm_servers.API_KEY


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray instance with two CPUs, shared by every test of the session."""
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    if started:
        ray.shutdown()
