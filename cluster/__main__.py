"""The command line: `tutelage COMMAND ...`, and the same as `python -m cluster COMMAND ...`.

Only the standard library is imported before a command is known, so that `--help` is instant.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.labels.arguments import add_actions

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tutelage",
        description="A teacher labels a corpus once; any number of students learn from the cache.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in (
        ("label", "label a corpus with a teacher; only what is missing is computed"),
        ("train", "train a student from a view of labels; continues where it stopped"),
        ("evaluate", "compare students with their teacher on held-out rows"),
    ):
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        command.add_argument("config", help="a TOML file: a complete run by itself")
        command.add_argument(
            "overrides", nargs="*", metavar="key.sub=value", help="values that replace the file's"
        )
        if name == "label":
            _add_plan(command)
        _add_json(command)
    text = "look after label sets"
    labels = commands.add_parser("labels", help=text, description=text.capitalize() + ".")
    for action in add_actions(labels):
        _add_json(action)
    text = "run label, train or evaluate on a Ray cluster"
    submit = commands.add_parser("submit", help=text, description=text.capitalize() + ".")
    submit.add_argument("job", choices=("label", "train", "evaluate"))
    submit.add_argument("config")
    submit.add_argument("overrides", nargs="*", metavar="key.sub=value")
    submit.add_argument(
        "--address",
        help="the job server, http://HOST:8265; default: RAY_API_SERVER_ADDRESS",
    )
    submit.add_argument(
        "--working-dir", default=".", help="the folder that travels to the cluster (default: .)"
    )
    submit.add_argument("--no-wait", action="store_true", help="return once it is submitted")
    text = "the whole way on this machine: corpus, labels, two students, comparison"
    demo = commands.add_parser("demo", help=text, description=text.capitalize() + ".")
    demo.add_argument("--out", default="runs/demo", help="folder for everything it writes")
    _add_json(demo)
    return parser


def _add_plan(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--plan", action="store_true", help="only say what it would take: tokens, bytes, hours"
    )
    command.add_argument(
        "--price-per-hour", type=float, metavar="X", help="of one replica, for the plan's cost"
    )


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", metavar="PATH", help="also write the summary there as JSON")


def _write_json(path: str | None, text: str) -> None:
    from schemas.storage.local_files import replace_file

    if path is not None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, f"{text}\n".encode())


def _label(args: argparse.Namespace) -> int:
    from labeler.config import LabelConfig
    from labeler.run.job import run_label_job
    from schemas.config import load_toml

    config = load_toml(args.config, LabelConfig, args.overrides)
    if args.plan:
        from labeler.planning.job import plan_label_job

        plan = plan_label_job(config, price_per_hour=args.price_per_hour)
        _write_json(args.json, plan.model_dump_json(indent=2))
        return 0
    summary = run_label_job(config)
    _write_json(args.json, summary.model_dump_json(indent=2))
    return 0


def _train(args: argparse.Namespace) -> int:
    from schemas.config import load_toml
    from trainer.config.train import TrainConfig
    from trainer.run.launch import run_train_job

    config = load_toml(args.config, TrainConfig, args.overrides)
    summary = run_train_job(config)
    _write_json(args.json, summary.model_dump_json(indent=2))
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from schemas.config import load_toml
    from trainer.config.evaluate import EvaluateConfig

    config = load_toml(args.config, EvaluateConfig, args.overrides)
    from trainer.evaluation.compare import (
        run_evaluate,  # imports torch: a wrong config need not wait
    )

    summary = run_evaluate(config)
    _write_json(args.json, summary.model_dump_json(indent=2))
    return 0


def _labels(args: argparse.Namespace) -> int:
    from cluster.labels.commands import run_action

    outcome = run_action(args)
    _write_json(args.json, outcome.summary)
    return outcome.exit_code


def _submit(args: argparse.Namespace) -> int:
    from cluster.submit import submit

    return submit(
        args.job,
        args.config,
        args.overrides,
        address=args.address,
        working_dir=args.working_dir,
        wait=not args.no_wait,
    )


def _demo(args: argparse.Namespace) -> int:
    from cluster.demo.run import run_demo

    summary = run_demo(Path(args.out))
    _write_json(args.json, summary.model_dump_json(indent=2))
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "label": _label,
    "train": _train,
    "evaluate": _evaluate,
    "labels": _labels,
    "submit": _submit,
    "demo": _demo,
}


def quiet_libraries() -> None:
    """What the libraries say of themselves would drown what the user asked for."""
    for name, value in (
        ("RAY_USAGE_STATS_ENABLED", "0"),
        ("RAY_BACKEND_LOG_LEVEL", "fatal"),
        ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("VLLM_NO_USAGE_STATS", "1"),
        ("VLLM_LOGGING_LEVEL", "ERROR"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TQDM_DISABLE", "1"),
    ):
        os.environ.setdefault(name, value)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0 on success, 1 with one line on standard error where the user can mend it, 2 for words that
        are not a command, 130 when interrupted, 143 when SIGTERM ended a job in order.
    """
    args = _parser().parse_args(argv)
    quiet_libraries()
    from schemas.errors import JobStoppedError, TutelageError, first_line

    try:
        return COMMANDS[args.command](args)
    except JobStoppedError as stopped:
        print(stopped, file=sys.stderr)
        return EXIT_TERMINATED
    except TutelageError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except PermissionError as error:  # of a file that is in no store, such as that of --json
        print(f"error: {first_line(error)}; see to the permissions", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt as stopped:
        how = f": {stopped}" if str(stopped) else ""
        print(f"interrupted{how}; run the same command again to go on from here", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
