"""`tutelage demo`: labels a corpus, trains two students and compares them.

Every stage runs the code of the real command.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cluster.demo import closing_report
from cluster.demo.corpus import write_corpus, write_prompts
from cluster.output_file import write_file
from schemas.config import load_toml
from schemas.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "demo"

# About 340 training steps: enough for a clear gap between the students.
STUDENT_BYTES = 1_800_000
HELDOUT_BYTES = 340_000
NUM_PROMPTS = 100

# Fields of the label jobs' summaries that are added up.
_SUMMED = (
    "rows_read",
    "rows_labelled",
    "rows_reused",
    "rows_duplicate",
    "rows_quarantined",
    "tokens",
    "labels",
    "rows_generated",
)


class DemoSummary(BaseModel):
    """Content of runs/demo/summary.json.

    Attributes:
        label: accounts of both label jobs combined, with the backend and bytes per label.
        train: world_size, zero_stage, steps and tokens by student.
        evaluate: perplexity, kl_to_teacher (nats a token), top1_agreement, ece and more by model.
        seconds: wall-clock seconds of each stage.
    """

    label: dict[str, Any]
    train: dict[str, dict[str, Any]]
    evaluate: dict[str, dict[str, Any]]
    seconds: dict[str, float]


@contextmanager
def _stage(seconds: dict[str, float], name: str, text: str) -> Iterator[None]:
    """Announces a stage and records its wall-clock seconds."""
    print(f"\n== {name}: {text}", flush=True)
    started = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - started, 1)


def run_demo(out: Path) -> DemoSummary:
    """Runs all stages; leaves summary.json, the configs and learning_curves.png in `out`.

    A second run reuses the labels and the students of the first.

    Raises:
        ConfigError: the package was installed without the repository's examples.
    """
    if not EXAMPLES.is_dir():
        raise ConfigError(
            f"{EXAMPLES}: no such folder; the demo needs the repository's examples: clone it and "
            "install it with `pip install --editable`"
        )
    seconds: dict[str, float] = {}
    _write_configs(out)
    with _stage(seconds, "corpus", "this Python's standard library, split by module"):
        _make_corpus(out)
    with local_ray():
        label = _label(out, seconds)
        train = _train(out, seconds)
    with _stage(seconds, "evaluate", "both students and their teacher on held-out files"):
        evaluate = _evaluate(out)
    with _stage(seconds, "report", "learning curves and a completion by each student"):
        closing_report.plot_curves(out, out / "learning_curves.png")
        closing_report.show_completions(out)
    summary = DemoSummary(label=label, train=train, evaluate=evaluate, seconds=seconds)
    write_file(str(out / "summary.json"), f"{summary.model_dump_json(indent=2)}\n")
    closing_report.show_closing(out, summary.evaluate, summary.seconds)
    return summary


def _write_configs(out: Path) -> None:
    """Writes the shipped configs with this run's paths, for the user to read and edit."""
    out.mkdir(parents=True, exist_ok=True)
    for source in sorted(EXAMPLES.glob("*.toml")):
        text = source.read_text(encoding="utf-8")
        text = text.replace('"runs/demo', f'"{out.as_posix()}')
        if Path.cwd() != ROOT:
            text = text.replace('"examples/', f'"{ROOT.as_posix()}/examples/')
        (out / source.name).write_text(text, encoding="utf-8")


def _make_corpus(out: Path) -> None:
    corpus = out / "corpus"
    sizes = write_corpus(corpus, {"students": STUDENT_BYTES, "heldout": HELDOUT_BYTES})
    prompts = write_prompts(corpus / "students", corpus / "prompts.jsonl", NUM_PROMPTS)
    print(
        f"students {sizes['students'] / 1e6:.2f} MB, held-out {sizes['heldout'] / 1e6:.2f} MB, "
        f"{prompts} function headers as prompts"
    )


@contextmanager
def local_ray() -> Iterator[None]:
    """Starts a local Ray for all stages: jobs connect to a running one if they find it."""
    import ray

    ray.init(
        address="local",
        num_cpus=max(2, os.cpu_count() or 2),  # two training workers, even on one core
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    try:
        yield
    finally:
        ray.shutdown()


def _label(out: Path, seconds: dict[str, float]) -> dict[str, Any]:
    from labeler.config import LabelConfig
    from labeler.run.job import run_label_job
    from schemas.views.select import Selection, make_views

    with _stage(
        seconds, "label", "the teacher labels the students' and the held-out files in vLLM"
    ):
        corpus = run_label_job(load_toml(str(out / "label.toml"), LabelConfig))
    with _stage(
        seconds, "generate", "the teacher completes function headers, then labels the result"
    ):
        responses = run_label_job(load_toml(str(out / "generate.toml"), LabelConfig))
    labels = f"{out / 'labels'}:{corpus.run}"
    generated = f"{out / 'responses'}:{responses.run}"
    heldout = f"source.startswith({(out / 'corpus' / 'heldout').as_posix() + '/'!r})"
    for name, sources, where in (
        ("heldout", (labels,), heldout),
        ("train", (labels, generated), f"not {heldout}"),
    ):
        print(*make_views(str(out / "views" / name), "", Selection(sources=sources, where=where)))
    return {
        "teacher_backend": corpus.teacher_backend,
        **{name: getattr(corpus, name) + getattr(responses, name) for name in _SUMMED},
        "bytes_per_label": corpus.bytes_per_label,
        "ids_per_label": corpus.ids_per_label,
    }


def _train(out: Path, seconds: dict[str, float]) -> dict[str, dict[str, Any]]:
    from trainer.config.train import TrainConfig
    from trainer.run.launch import run_train_job

    result: dict[str, dict[str, Any]] = {}
    for name, text in (("kd", "distilled from the labels"), ("ce", "trained on hard labels only")):
        with _stage(seconds, f"train_{name}", f"a student {text}"):
            summary = run_train_job(load_toml(str(out / f"train_{name}.toml"), TrainConfig))
            result[f"student_{name}"] = summary.model_dump(
                include={"world_size", "zero_stage", "steps", "tokens", "final_loss"}
            )
    return result


def _evaluate(out: Path) -> dict[str, dict[str, Any]]:
    from trainer.config.evaluate import EvaluateConfig
    from trainer.evaluation.compare import run_evaluate

    summary = run_evaluate(load_toml(str(out / "evaluate.toml"), EvaluateConfig))
    return {name: metrics.model_dump() for name, metrics in summary.models.items()}
