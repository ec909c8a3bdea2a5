"""The end of the demo: learning curves, a completion by each student, and a summary."""

import json
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STUDENTS = {"student_kd": "distilled", "student_ce": "hard labels"}
COMPLETION_TOKENS = 64


def plot_curves(out: Path, path: Path) -> None:
    """Plots the training cross-entropy of each student against the tokens it has seen."""
    import matplotlib

    matplotlib.use("Agg")  # renders to files, without a display
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for student, label in STUDENTS.items():
        lines = (out / student / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        points = [point for point in map(json.loads, lines) if point["kind"] == "train"]
        axes.plot([p["tokens"] / 1e3 for p in points], [p["ce"] for p in points], label=label)
    axes.set_xlabel("training tokens (thousands)")
    axes.set_ylabel("cross-entropy of the real token (nats)")
    axes.set_title("The same student, weights, tokens, order and schedule")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"learning curves: {os.path.relpath(path)}")


def show_completions(out: Path) -> None:
    """Prints each student's greedy completion of the same held-out function header."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cluster.demo.corpus import function_headers

    prompt = next(function_headers(out / "corpus" / "heldout", 1))
    print(f"\nheld-out function header:\n\n{_indent(prompt)}")
    for student, label in STUDENTS.items():
        folder = out / student / "student"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            full = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=COMPLETION_TOKENS,
                do_sample=False,
                repetition_penalty=1.2,  # without it, greedy decoding of a small model loops
                pad_token_id=tokenizer.eos_token_id,
            )
        text = tokenizer.decode(full[0, ids.shape[1] :], skip_special_tokens=True)
        print(f"completion by the student ({label}):\n\n{_indent(text.rstrip())}\n")


def show_closing(
    out: Path, evaluate: Mapping[str, Mapping[str, Any]], seconds: Mapping[str, float]
) -> None:
    """Prints the comparison, the time of each stage, and what to try next."""
    kd, ce = evaluate["student_kd"], evaluate["student_ce"]
    print(
        f"\nheld-out perplexity: {kd['perplexity']:.1f} distilled, {ce['perplexity']:.1f} with "
        f"hard labels; KL to the teacher: {kd['kl_to_teacher']:.3f} and {ce['kl_to_teacher']:.3f}"
    )
    print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    print(
        f"summary: {out}/summary.json\n"
        f"next: edit {out}/train_kd.toml and run "
        f"`tutelage train {out}/train_kd.toml run={out}/student_2`, which reuses the labels"
    )


def _indent(text: str) -> str:
    return textwrap.indent(text, "    ", lambda line: True)
