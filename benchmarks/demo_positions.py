"""The demo teacher's distributions at positions of the demo's corpus."""

import hashlib
from typing import Any, NamedTuple

import torch

from benchmarks.demo_labels import TEACHER
from cluster.demo.corpus import corpus_part, library_files

WINDOW = 256
"""Tokens per sequence."""
PER_WINDOW = 8
"""Positions sampled per sequence; neighbours are too similar to add information."""
FIRST = 32
"""First position sampled; earlier ones have too little context to be typical."""


class Positions(NamedTuple):
    """A teacher's output at T positions; vocabulary size V, hidden size H.

    Attributes:
        logits: float32 [T, V].
        target_ids: int64 [T], the token at each position.
        head: float32 [V, H], the teacher's output head.
    """

    logits: torch.Tensor
    target_ids: torch.Tensor
    head: torch.Tensor


def teacher_positions(num_positions: int, seed: int = 0) -> Positions:
    """Samples positions of the students' part of the corpus, which the teacher never saw.

    Args:
        num_positions: T; a few from each of as many files as needed.
        seed: selects the positions.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()
    windows = _windows(tokenizer, -(-num_positions // PER_WINDOW))
    generator = torch.Generator().manual_seed(seed)
    logits, targets = [], []
    for window in windows:
        tokens = torch.tensor([window])
        with torch.no_grad():
            at_window = model(tokens).logits[0].float()
        picked = FIRST + torch.randperm(WINDOW - FIRST, generator=generator)[:PER_WINDOW]
        logits.append(at_window[picked - 1])
        targets.append(tokens[0, picked])
    return Positions(
        torch.cat(logits)[:num_positions],
        torch.cat(targets)[:num_positions],
        model.get_output_embeddings().weight.detach(),
    )


def _windows(tokenizer: Any, count: int) -> list[list[int]]:
    """Returns a window from the middle of each of `count` files."""
    files = [
        (hashlib.sha256(name.encode()).hexdigest(), path)
        for name, path in library_files()
        if corpus_part(name.split("/")[0].removesuffix(".py")) == "students"
    ]
    windows = []
    for _, path in sorted(files):
        tokens = tokenizer(path.read_text(encoding="utf-8", errors="replace"))["input_ids"]
        middle = max(0, len(tokens) // 2 - WINDOW // 2)
        if len(tokens) >= WINDOW:
            windows.append(tokens[middle : middle + WINDOW])
        if len(windows) == count:
            break
    return windows
