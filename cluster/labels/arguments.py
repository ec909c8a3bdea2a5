"""The words of `tutelage labels ACTION`. Imports the standard library only: help is instant."""

import argparse
from collections.abc import Iterator

OLDER_THAN_HOURS = 48.0
"""Longer than any unit lives: from its first byte to its manifest it takes minutes."""


def add_actions(labels: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Adds every action to the parser of `labels`, and yields each action's own."""
    actions = labels.add_subparsers(dest="action", metavar="ACTION", required=True)
    for add in (_ls, _show, _verify, _view, _export, _report, _drop, _gc):
        yield add(actions)


def _action(actions: argparse._SubParsersAction, name: str, text: str) -> argparse.ArgumentParser:  # type: ignore[type-arg]
    parser: argparse.ArgumentParser = actions.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + "."
    )
    return parser


def _ls(actions: argparse._SubParsersAction) -> argparse.ArgumentParser:  # type: ignore[type-arg]
    parser = _action(actions, "ls", "list the label sets below a URL")
    parser.add_argument("url", help="a folder, local or in an object store")
    return parser


def _show(actions: argparse._SubParsersAction) -> argparse.ArgumentParser:  # type: ignore[type-arg]
    parser = _action(actions, "show", "spec, accounts, distributions and sample rows")
    parser.add_argument("url", help="the label set")
    parser.add_argument("--groups", type=int, default=8, help="row groups to sample (default: 8)")
    parser.add_argument("--rows", type=int, default=2, help="sample rows to show (default: 2)")
    parser.add_argument(
        "--positions", type=int, default=12, help="labelled positions of a row (default: 12)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    return parser


def _verify(actions: argparse._SubParsersAction) -> argparse.ArgumentParser:  # type: ignore[type-arg]
    parser = _action(actions, "verify", "check every byte and every invariant; 1 if any is wrong")
    parser.add_argument("url", help="the label set")
    return parser


def _view(actions: argparse._SubParsersAction) -> argparse.ArgumentParser:  # type: ignore[type-arg]
    parser = _action(actions, "view", "make a view: filter, sample, mix, hold out")
    parser.add_argument("out", help="URL of the view; with --holdout OUT/train and OUT/heldout")
    parser.add_argument(
        "--from",
        dest="sources",
        action="append",
        required=True,
        metavar="URL[:RUN]",
        help="a label set, and which run of it (default: every row of its runs); repeat to mix",
    )
    parser.add_argument(
        "--where",
        metavar="EXPR",
        help="keep rows for which it holds: \"num_labels >= 64 and source.endswith('.py')\"",
    )
    parser.add_argument(
        "--sample", metavar="FRACTION|ROWS", help="keep that share (0.1) or number (5000) of rows"
    )
    parser.add_argument(
        "--weights",
        metavar="W,W,...",
        help="shares of rows of each --from in the view; rows are left out, never repeated",
    )
    parser.add_argument("--holdout", type=float, metavar="FRACTION", help="of documents")
    parser.add_argument(
        "--holdout-to", metavar="URL", help="then OUT is the rest, and this the held-out view"
    )
    parser.add_argument("--seed", type=int, default=0, help="of samples and splits (default: 0)")
    return parser


def _export(actions: argparse._SubParsersAction) -> argparse.ArgumentParser:  # type: ignore[type-arg]
    parser = _action(actions, "export", "responses or labels in the layouts of other trainers")
    parser.add_argument("url", help="the label set")
    parser.add_argument("out", help="file (chat-jsonl, chat-parquet) or folder to write")
    parser.add_argument(
        "--format",
        required=True,
        choices=("chat-jsonl", "chat-parquet", "axolotl", "distillkit"),
    )
    parser.add_argument(
        "--tokenizer", help="folder or hub name; chat formats (default: the teacher's, if recorded)"
    )
    return parser


def _report(actions: argparse._SubParsersAction) -> argparse.ArgumentParser:  # type: ignore[type-arg]
    parser = _action(actions, "report", "one HTML file with plots")
    parser.add_argument("url", help="the label set")
    parser.add_argument("--out", required=True, help="the file to write")
    parser.add_argument("--groups", type=int, default=32, help="row groups to sample (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    return parser


def _drop(actions: argparse._SubParsersAction) -> argparse.ArgumentParser:  # type: ignore[type-arg]
    parser = _action(actions, "drop", "take a damaged unit out; label again to mend it")
    parser.add_argument("url", help="the label set")
    parser.add_argument("--unit", required=True, metavar="KEY", help="as the error named it")
    return parser


def _gc(actions: argparse._SubParsersAction) -> argparse.ArgumentParser:  # type: ignore[type-arg]
    parser = _action(actions, "gc", "what no manifest names: list it, or delete it")
    parser.add_argument("url", help="the label set")
    parser.add_argument(
        "--older-than",
        type=float,
        default=OLDER_THAN_HOURS,
        metavar="HOURS",
        help=f"only files not written to for so long (default: {OLDER_THAN_HOURS:g}); it has to "
        "be longer than any unit lives, or a running job loses its work",
    )
    parser.add_argument("--delete", action="store_true", help="delete; without it, only list")
    return parser
