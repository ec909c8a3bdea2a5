"""`tutelage demo`: corpus, labels, two equal students, comparison; every part the real one."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cluster.demo import closing_report
from cluster.demo.corpus import write_corpus, write_prompts
from schemas.config import load_toml
from schemas.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "demo"

# Some 340 steps: enough for a clear gap between the students.
STUDENT_BYTES = 1_800_000
HELDOUT_BYTES = 340_000
NUM_PROMPTS = 100


class DemoSummary(BaseModel):
    """What runs/demo/summary.json holds.

    Attributes:
        label: the accounts of all label jobs together, with the backend and bytes a label.
        train: per student: world_size, zero_stage, steps, tokens.
        evaluate: per model: perplexity, kl_to_teacher (nats a token), top1_agreement, ece and more.
        seconds: wall-clock seconds of each stage.
    """

    label: dict[str, Any]
    train: dict[str, dict[str, Any]]
    evaluate: dict[str, dict[str, Any]]
    seconds: dict[str, float]


class Stages:
    """Names each stage as it starts and keeps how long it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, text: str) -> Iterator[None]:
        print(f"\n== {name}: {text}", flush=True)
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 1)


def run_demo(out: Path) -> DemoSummary:
    """Runs the whole way below `out` and leaves summary.json, the configs, and learning_curves.png.

    Run again, it reuses the labels and the students that are there.

    Raises:
        ConfigError: the repository's examples are not beside the package.
    """
    if not EXAMPLES.is_dir():
        raise ConfigError(
            f"{EXAMPLES}: no such folder; the demo needs the examples of the repository, "
            "from a clone installed with `pip install --editable`"
        )
    stages = Stages()
    _write_configs(out)
    with stages.stage("corpus", "this Python's standard library, split by module"):
        _make_corpus(out)
    with local_ray():
        label = _label(out, stages)
        train = _train(out, stages)
    with stages.stage("evaluate", "both students and their teacher on held-out files"):
        evaluate = _evaluate(out)
    with stages.stage("report", "learning curves and a function from each student"):
        closing_report.plot_curves(out, out / "learning_curves.png")
        closing_report.show_completions(out)
    summary = DemoSummary(label=label, train=train, evaluate=evaluate, seconds=stages.seconds)
    (out / "summary.json").write_text(summary.model_dump_json(indent=2) + "\n", encoding="utf-8")
    closing_report.show_closing(out, summary.evaluate, summary.seconds)
    return summary


def _write_configs(out: Path) -> None:
    """The shipped configs with this run's paths, for a user to read and to go on from."""
    out.mkdir(parents=True, exist_ok=True)
    for source in sorted(EXAMPLES.glob("*.toml")):
        text = source.read_text(encoding="utf-8")
        text = text.replace('"runs/demo', f'"{out.as_posix()}')
        if Path.cwd() != ROOT:
            text = text.replace('"examples/', f'"{ROOT.as_posix()}/examples/')
        (out / source.name).write_text(text, encoding="utf-8")


def _make_corpus(out: Path) -> None:
    sizes = write_corpus(out / "corpus", {"students": STUDENT_BYTES, "heldout": HELDOUT_BYTES})
    prompts = write_prompts(
        out / "corpus" / "students", out / "corpus" / "prompts.jsonl", NUM_PROMPTS
    )
    print(
        f"students {sizes['students'] / 1e6:.2f} MB, held-out {sizes['heldout'] / 1e6:.2f} MB, "
        f"{prompts} function headers as prompts"
    )


@contextmanager
def local_ray() -> Iterator[None]:
    """One local Ray for all stages; the jobs use the one that is there."""
    import ray

    ray.init(
        address="local",
        num_cpus=max(2, os.cpu_count() or 2),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    try:
        yield
    finally:
        ray.shutdown()


def _label(out: Path, stages: Stages) -> dict[str, Any]:
    from labeler.config import LabelConfig
    from labeler.run.job import run_label_job

    def job(name: str) -> Any:
        return run_label_job(load_toml(str(out / f"{name}.toml"), LabelConfig))

    with stages.stage("label", "the students' files and the held-out ones, by the teacher in vLLM"):
        corpus = job("label")
    with stages.stage("generate", "the teacher completes function headers, then scores them"):
        responses = job("generate")
    labels = f"{out / 'labels'}:{corpus.run}"
    prefix = (out / "corpus" / "heldout").as_posix() + "/"
    is_heldout = f"source.startswith({prefix!r})"
    _make_view(out / "views" / "heldout", [labels], is_heldout)
    _make_view(
        out / "views" / "train",
        [labels, f"{out / 'responses'}:{responses.run}"],
        f"not {is_heldout}",
    )
    jobs = [corpus, responses]
    counts = [
        "rows_read",
        "rows_labelled",
        "rows_reused",
        "rows_duplicate",
        "rows_quarantined",
        "tokens",
        "labels",
        "rows_generated",
    ]
    totals = {name: sum(getattr(one, name) for one in jobs) for name in counts}
    return {
        "teacher_backend": corpus.teacher_backend,
        **totals,
        "bytes_per_label": corpus.bytes_per_label,
        "ids_per_label": corpus.ids_per_label,
    }


def _make_view(url: Path, sources: list[str], where: str) -> None:
    from schemas.views.select import Selection, make_views

    print(*make_views(str(url), "", Selection(sources=tuple(sources), where=where)))


def _train(out: Path, stages: Stages) -> dict[str, dict[str, Any]]:
    from trainer.config.train import TrainConfig
    from trainer.run.launch import run_train_job

    result: dict[str, dict[str, Any]] = {}
    for name, text in (("kd", "distilled from the labels"), ("ce", "on hard labels alone")):
        with stages.stage(f"train_{name}", f"a student {text}"):
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
