"""The command line of `tutelage labels`. Imports only the standard library, for instant help."""

import argparse
from collections.abc import Callable, Iterator

OLDER_THAN_HOURS = 48.0
"""Well above the minutes between a unit's first byte and its manifest."""


def add_actions(labels: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Adds every action to the parser of `labels` and yields its parser."""
    actions = labels.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, (text, add_arguments) in _ACTIONS.items():
        parser = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        add_arguments(parser)
        yield parser


def _ls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", help="local folder or object store URL to search")


def _label_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", help="URL of the label set")


def _number(parser: argparse.ArgumentParser, option: str, default: int, text: str) -> None:
    help_text = f"{text} (default: {default})"
    parser.add_argument(option, type=int, metavar="N", default=default, help=help_text)


def _show(parser: argparse.ArgumentParser) -> None:
    _label_set(parser)
    _number(parser, "--groups", 8, "row groups to sample")
    _number(parser, "--rows", 2, "sample rows to print")
    _number(parser, "--positions", 12, "labels to print per row")
    _number(parser, "--seed", 0, "seed of the sample")


def _view(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", help="URL of the view; --holdout writes OUT/train and OUT/heldout")
    parser.add_argument(
        "--from",
        dest="sources",
        action="append",
        required=True,
        metavar="URL[:RUN]",
        help="label set, optionally only the rows of one run; repeat to combine label sets",
    )
    parser.add_argument(
        "--where",
        metavar="EXPR",
        help="keep only rows that match, as in \"num_labels >= 64 and source.endswith('.py')\"",
    )
    parser.add_argument(
        "--sample",
        metavar="FRACTION|ROWS",
        help="keep this fraction (0.1) or number (5000) of rows",
    )
    parser.add_argument(
        "--weights",
        metavar="W,W,...",
        help="share of each --from in the view's rows; rows are dropped to fit, never repeated",
    )
    parser.add_argument(
        "--holdout", type=float, metavar="FRACTION", help="fraction of documents to hold out"
    )
    parser.add_argument(
        "--holdout-to", metavar="URL", help="write the held-out view here, and the rest to OUT"
    )
    _number(parser, "--seed", 0, "seed of samples and splits")


def _export(parser: argparse.ArgumentParser) -> None:
    _label_set(parser)
    parser.add_argument("out", help="file (chat-jsonl, chat-parquet) or folder to write")
    parser.add_argument(
        "--format",
        required=True,
        choices=("chat-jsonl", "chat-parquet", "axolotl", "distillkit"),
        help="chat-*: sampled responses as messages; axolotl: top-k or top-p labels; distillkit: "
        "top-k labels",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="tokenizer for chat-*, a folder or hub name (default: the recorded teacher's)",
    )


def _report(parser: argparse.ArgumentParser) -> None:
    _label_set(parser)
    _number(parser, "--groups", 32, "row groups to sample")
    _number(parser, "--seed", 0, "seed of the sample")
    parser.add_argument("--out", required=True, metavar="FILE", help="HTML file to write")


def _drop(parser: argparse.ArgumentParser) -> None:
    _label_set(parser)
    parser.add_argument(
        "--unit", required=True, metavar="KEY", help="key of the unit, as printed by verify"
    )


def _gc(parser: argparse.ArgumentParser) -> None:
    _label_set(parser)
    parser.add_argument(
        "--older-than",
        type=float,
        default=OLDER_THAN_HOURS,
        metavar="HOURS",
        help="only files last written at least this long ago; must exceed the time a running "
        f"job needs for a unit, or the job loses work (default: {OLDER_THAN_HOURS:g})",
    )
    parser.add_argument(
        "--delete", action="store_true", help="delete the files instead of listing them"
    )


_ACTIONS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "ls": ("list the label sets below a URL", _ls),
    "show": ("print a label set's spec, accounts, distributions and sample rows", _show),
    "verify": ("check every byte and every invariant; exit code 1 if any is wrong", _label_set),
    "view": ("make a view: filter, sample, mix or hold out rows", _view),
    "export": ("write responses or labels in the layout of another trainer", _export),
    "report": ("write an HTML report with plots", _report),
    "drop": ("remove a damaged unit; the next label job recomputes it", _drop),
    "gc": ("list or delete files that no manifest names", _gc),
}
