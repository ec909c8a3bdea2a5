"""Student quality by kind of label: ``python -m benchmarks.quality``.

Uses the demo's teacher, corpus, student and schedule. From the same initial weights and in the same
order, one student is trained on each target alone, with no hard-label mix: hard labels, 12 and 64
top ids (with the tail as a bucket), Random Sampling KD and threshold labels of at most 14 ids, and
the full distribution (a head as wide as the vocabulary). Repeated over seeds of weights and order.

Results: held-out cross-entropy ``ce`` (nats), ``kl`` to the teacher (nats) and ``ece`` by target,
averaged over the seeds, and ``kept``: the share of the full distribution's gain in cross-entropy
over hard labels that a target keeps. About 45 minutes on two cores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import command_line, write_results
from cluster.__main__ import quiet_libraries
from cluster.demo.corpus import write_corpus
from cluster.demo.run import EXAMPLES, HELDOUT_BYTES, STUDENT_BYTES, local_ray
from labeler.config import LabelConfig
from labeler.run.job import run_label_job
from labeler.run.summary import LabelSummary
from schemas.config import load_toml
from schemas.console.text import table
from trainer.config.evaluate import EvaluateConfig
from trainer.config.train import TrainConfig
from trainer.run.launch import run_train_job

MEASURES = {"ce": "cross_entropy", "kl": "kl_to_teacher", "ece": "ece"}


@dataclass(frozen=True)
class Target:
    """One row of the table, as TOML: the record of the labels and the loss that reads it."""

    record: str
    loss: str


# Each keeps about 14 ids per label.
_THRESHOLD = '{kind = "threshold", tau = 0.048}'
_SAMPLED = '{kind = "sampled", draws = 24}'

TARGETS = {
    "hard": Target(_THRESHOLD, '{kind = "hard"}'),
    "topk_12": Target('{kind = "topk", k = 12}', '{kind = "ghost"}'),
    "topk_64": Target('{kind = "topk", k = 64}', '{kind = "ghost"}'),
    "sampled": Target(_SAMPLED, '{kind = "forward_kl"}'),
    "threshold": Target(_THRESHOLD, '{kind = "forward_kl"}'),
    "full": Target('{kind = "topk", k = 4096, entropy = false}', '{kind = "ghost"}'),
}


def main() -> None:
    parser = command_line("quality", __doc__)
    parser.add_argument("--out", default="runs/quality", help="folder of labels and students")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--targets", nargs="*", choices=TARGETS, default=list(TARGETS))
    args = parser.parse_args()
    quiet_libraries()
    write_results(args, measure(Path(args.out), range(args.seeds), args.targets))


def measure(out: Path, seeds: Sequence[int], targets: Sequence[str]) -> dict[str, Any]:
    """Labels, trains and evaluates, reusing the results of an earlier run."""
    write_corpus(out / "corpus", {"students": STUDENT_BYTES, "heldout": HELDOUT_BYTES})
    with local_ray():
        _label(out, "heldout", "threshold")
        # Hard labels are the tokens of any label set, so they need no set of their own.
        labelled = {"hard": "threshold"} | {name: name for name in targets if name != "hard"}
        ids = {name: _label(out, "students", labelled[name]).ids_per_label for name in targets}
        for seed in seeds:
            for name in targets:
                _train(out, name, labelled[name], seed)
    by_seed = [_evaluate(out, targets, seed) for seed in seeds]
    figures = _averages(by_seed, targets)
    figures["ids_per_label"] = {**ids, "hard": 1.0}
    _show(figures, targets, len(seeds))
    return figures


def _label(out: Path, part: str, target: str) -> LabelSummary:
    overrides = [
        f"labels={out}/labels/{target}",
        f"view={out}/views/{part}_{target}",
        f"corpus.path={out}/corpus/{part}",
        f"record={TARGETS[target].record}",
        # The training order follows row groups, whose size depends on the record. Units of one row
        # are one row group under any record, so all targets get the same order.
        "run.unit_rows=1",
    ]
    return run_label_job(load_toml(str(EXAMPLES / "label.toml"), LabelConfig, overrides))


def _train(out: Path, target: str, labels: str, seed: int) -> None:
    overrides = [
        f"run={out}/students/{target}_{seed}",
        f"view={out}/views/students_{labels}",
        f"loss={TARGETS[target].loss}",
        f"student.seed={seed}",
        f"data.seed={seed}",
        "data.window_row_groups=64",
    ]
    run_train_job(load_toml(str(EXAMPLES / "train_kd.toml"), TrainConfig, overrides))


def _evaluate(out: Path, targets: Sequence[str], seed: int) -> Mapping[str, Any]:
    from trainer.evaluation.compare import run_evaluate

    students = ", ".join(f'{name} = "{out}/students/{name}_{seed}/student"' for name in targets)
    overrides = [f"view={out}/views/heldout_threshold", f"students={{{students}}}"]
    return run_evaluate(
        load_toml(str(EXAMPLES / "evaluate.toml"), EvaluateConfig, overrides)
    ).models


def _averages(by_seed: Sequence[Mapping[str, Any]], targets: Sequence[str]) -> dict[str, Any]:
    figures: dict[str, Any] = {"by_seed": {}}
    for short, name in MEASURES.items():
        values = {
            target: [float(getattr(models[target], name)) for models in by_seed]
            for target in targets
        }
        figures["by_seed"][short] = values
        figures[short] = {target: sum(found) / len(found) for target, found in values.items()}
    ce = figures["ce"]
    if {"hard", "full"} <= set(targets):
        gain = ce["hard"] - ce["full"]
        figures["kept"] = {target: (ce["hard"] - ce[target]) / gain for target in targets}
    return figures


def _show(figures: Mapping[str, Any], targets: Sequence[str], num_seeds: int) -> None:
    lines = [
        (
            target,
            f"{figures['ids_per_label'][target]:.1f}",
            f"{figures['ce'][target]:.4f}",
            f"{figures['kl'][target]:.4f}",
            f"{100 * figures['ece'][target]:.2f}",
            f"{100 * figures['kept'][target]:.1f}" if "kept" in figures else "",
        )
        for target in targets
    ]
    print(f"\nmean of {num_seeds} seeds, held-out text\n")
    print(table(("target", "ids", "CE", "KL", "ECE %", "kept %"), lines, right=range(1, 6)))


if __name__ == "__main__":
    main()
