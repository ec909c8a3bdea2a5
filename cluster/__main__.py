"""The command line: `tutelage COMMAND ...`, or `python -m cluster COMMAND ...`.

Only the standard library is imported until the command is known, so that `--help` is instant.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from cluster.labels.arguments import add_actions

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tutelage",
        description="Label a corpus once with a teacher, then train any number of students on the "
        "stored labels.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")

    label = add("label", "label a corpus with a teacher; only missing labels are computed")
    train = add("train", "train a student on a view of the labels; resumes where it stopped")
    evaluate = add("evaluate", "compare students with their teacher on held-out rows")
    for command in (label, train, evaluate):
        command.add_argument("config", help="TOML file that describes the run (docs/config.md)")
        _add_overrides(command)
    label.add_argument(
        "--plan", action="store_true", help="only estimate the tokens, bytes and hours it takes"
    )
    label.add_argument(
        "--price-per-hour", type=float, metavar="X", help="with --plan: price of one replica"
    )
    labels = add("labels", "inspect, check, filter, export and clean up label sets")
    demo = add("demo", "run label, train and evaluate on this machine with a small teacher")
    demo.add_argument(
        "--out", metavar="FOLDER", default="runs/demo", help="output folder (default: runs/demo)"
    )
    for command in (label, train, evaluate, demo, *add_actions(labels)):
        command.add_argument("--json", metavar="PATH", help="also write the summary to PATH")

    submit = add("submit", "submit label, train or evaluate to a Ray cluster as a job")
    submit.add_argument("job", choices=("label", "train", "evaluate"), help="command to run")
    submit.add_argument("config", help="its TOML file, inside the working directory")
    _add_overrides(submit)
    submit.add_argument(
        "--address",
        metavar="URL",
        help="Ray job server, http://HOST:8265 (default: $RAY_API_SERVER_ADDRESS)",
    )
    submit.add_argument(
        "--working-dir",
        metavar="FOLDER",
        default=".",
        help="folder uploaded to the cluster (default: .)",
    )
    submit.add_argument("--no-wait", action="store_true", help="do not follow the job's output")
    return parser


def _add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="values that override the file's"
    )


Result = tuple[str, int]  # the summary as JSON, "" for none, and the exit code


def _label(args: argparse.Namespace) -> Result:
    from labeler.config import LabelConfig
    from labeler.run.job import run_label_job
    from schemas.config import load_toml

    config = load_toml(args.config, LabelConfig, args.overrides)
    if args.plan:
        from labeler.planning.job import plan_label_job

        plan = plan_label_job(config, price_per_hour=args.price_per_hour)
        return plan.model_dump_json(indent=2), 0
    return run_label_job(config).model_dump_json(indent=2), 0


def _train(args: argparse.Namespace) -> Result:
    from schemas.config import load_toml
    from trainer.config.train import TrainConfig
    from trainer.run.launch import run_train_job

    config = load_toml(args.config, TrainConfig, args.overrides)
    return run_train_job(config).model_dump_json(indent=2), 0


def _evaluate(args: argparse.Namespace) -> Result:
    from schemas.config import load_toml
    from trainer.config.evaluate import EvaluateConfig

    config = load_toml(args.config, EvaluateConfig, args.overrides)
    # Imports torch, which takes seconds, so an invalid configuration is reported first.
    from trainer.evaluation.compare import run_evaluate

    return run_evaluate(config).model_dump_json(indent=2), 0


def _labels(args: argparse.Namespace) -> Result:
    from cluster.labels.commands import run_action

    return run_action(args)


def _submit(args: argparse.Namespace) -> Result:
    from cluster.submit import submit

    command = [args.job, args.config, *args.overrides]
    return "", submit(command, args.address, args.working_dir, wait=not args.no_wait)


def _demo(args: argparse.Namespace) -> Result:
    from pathlib import Path

    from cluster.demo.run import run_demo

    return run_demo(Path(args.out)).model_dump_json(indent=2), 0


COMMANDS: dict[str, Callable[[argparse.Namespace], Result]] = {
    "label": _label,
    "train": _train,
    "evaluate": _evaluate,
    "labels": _labels,
    "submit": _submit,
    "demo": _demo,
}


def quiet_libraries() -> None:
    """Lowers the log levels of libraries, which would drown the command's own output."""
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
        os.environ.setdefault(name, value)  # the user's settings win


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0 on success; 1 with one line on standard error for an error that the user can fix; 2 for a
        usage error; 130 if interrupted; 143 if SIGTERM stopped a job cleanly.
    """
    args = _parser().parse_args(argv)
    quiet_libraries()
    from schemas.errors import JobStoppedError, TutelageError, first_line

    try:
        summary, exit_code = COMMANDS[args.command](args)
        if summary and args.json:
            from cluster.output_file import write_file

            write_file(args.json, f"{summary}\n")
        return exit_code
    except JobStoppedError as stopped:
        print(stopped, file=sys.stderr)
        return EXIT_TERMINATED
    except TutelageError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except PermissionError as error:  # on a file outside any Store, such as in a run folder
        print(f"error: {first_line(error)}; check the permissions", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt as stopped:
        how = f": {stopped}" if str(stopped) else ""
        print(f"interrupted{how}; run the same command again to resume", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
