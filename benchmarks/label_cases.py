"""Teachers, rows and label sets of the labelling benchmark."""

from pathlib import Path

import numpy as np

from benchmarks.demo_labels import TEACHER, TokenRows, real_rows
from labeler.config import TeacherConfig
from labeler.corpus.requests import Request
from labeler.corpus.windows import all_but_first
from schemas.label_set.label_set import LabelSet
from schemas.spec import LabelSetSpec, RecordSpec, TeacherIdentity, TextSpec

K = 64
MODELS = ("demo", "wide")
MAX_TOKENS = 512

# With these taus, the teachers keep about 12 ids per label. A random model's distributions are so
# flat that almost every id is below tau, which gives 1 / tau draws.
_TAUS = {"demo": 0.047, "wide": 1 / 12}

# A small teacher with the vocabulary of a large one: its head is a third the size of its body.
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


def records(model: str) -> dict[str, RecordSpec]:
    """The measured kinds of record, by name."""
    return {
        f"topk_{K}": RecordSpec(kind="topk", k=K),
        "threshold_12": RecordSpec(kind="threshold", tau=_TAUS[model]),
    }


def make_folder(model: str, folder: Path) -> Path:
    """The folder of a model; creates the random one in ``folder``."""
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
    """The teacher in a folder, run by vLLM, with up to K candidates for the stock paths."""
    return TeacherConfig(
        backend="vllm",
        model=str(folder),
        max_model_len=MAX_TOKENS + 1,
        engine={"max_logprobs": K},
    )


def make_rows(model: str, num_tokens: int, row_tokens: int, vocab_size: int) -> TokenRows:
    """Held-out text for the demo's teacher, random ids for the random one."""
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


def make_label_set(folder: str, record: RecordSpec, vocab_size: int) -> LabelSet:
    """An empty label set."""
    spec = LabelSetSpec(
        record=record,
        teacher=TeacherIdentity(
            weights_digest="benchmark", tokenizer_digest="benchmark", vocab_size=vocab_size
        ),
        text=TextSpec(max_tokens=4096, overlap=0, add_bos=False, add_eos=False, split_long=True),
    )
    return LabelSet.create_or_open(folder, spec)


def make_requests(rows: TokenRows) -> list[Request]:
    """Builds the requests for rows, as the corpus tasks do."""
    triples = zip(rows.row_keys, rows.token_ids, rows.label_spans, strict=True)
    return [
        Request(key.tobytes(), tokens, spans, "benchmark", place)
        for place, (key, tokens, spans) in enumerate(triples)
    ]
