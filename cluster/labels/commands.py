"""From the words of `tutelage labels` to the work, and from its results to lines for people."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import NamedTuple


class Outcome(NamedTuple):
    """What a command leaves: its summary as JSON, and its exit code."""

    summary: str
    exit_code: int = 0


def run_action(args: argparse.Namespace) -> Outcome:
    """Runs one action; prints for people.

    Raises:
        TutelageError: as the action does.
    """
    return _ACTIONS[args.action](args)


def _verify(args: argparse.Namespace) -> Outcome:
    from schemas.maintenance.verify import verify

    started = time.monotonic()
    result = verify(args.url, _Progress("verify").show)
    for problem in result.problems:
        print(f"{problem.what}: {problem.line()}")
    repairs = dict.fromkeys(problem.repair for problem in result.problems)
    for repair in repairs:
        print(f"to mend: {repair}")
    wrong = f"{len(result.problems)} problems" if len(result.problems) != 1 else "1 problem"
    if result.units_to_drop:
        wrong += f" in {len(result.units_to_drop)} of {result.units} units"
    garbage = f"; {result.garbage} shards that no manifest names" if result.garbage else ""
    print(
        f"{args.url}: {wrong if result.problems else 'whole'}; checked {result.units:,} units, "
        f"{result.rows:,} rows, {result.labels:,} labels, {result.bytes:,} bytes in "
        f"{time.monotonic() - started:.1f} s{garbage}"
    )
    return Outcome(result.model_dump_json(indent=2), 1 if result.problems else 0)


def _ls(args: argparse.Namespace) -> Outcome:
    from cluster.labels.terminal import size_text, table
    from schemas.maintenance.listing import list_label_sets

    entries = list_label_sets(args.url)
    head = ("label set", "teacher", "record", "rows", "tokens", "labels", "size", "bytes/label")
    lines = [
        (
            entry.url,
            entry.teacher,
            entry.record,
            f"{entry.rows:,}",
            f"{entry.tokens:,}",
            f"{entry.labels:,}",
            size_text(entry.bytes),
            f"{entry.bytes_per_label:.1f}",
        )
        for entry in entries
        if not entry.problem
    ]
    print(table(head, lines, right=(3, 4, 5, 6, 7)) if entries else f"{args.url}: no label sets")
    for entry in entries:
        if entry.problem:
            print(f"unreadable: {entry.problem}")
    return Outcome(json.dumps({"label_sets": [entry.model_dump() for entry in entries]}, indent=2))


def _show(args: argparse.Namespace) -> Outcome:
    from cluster.labels.show.show import show

    text, facts = show(args.url, args.groups, args.rows, args.positions, args.seed)
    print(text)
    return Outcome(json.dumps(facts, indent=2))


def _view(args: argparse.Namespace) -> Outcome:
    from schemas.errors import ConfigError
    from schemas.views.select import Selection, make_views

    if args.holdout_to and not args.holdout:
        raise ConfigError("--holdout-to says where to, but --holdout does not say how much")
    out = args.out.rstrip("/")
    train, heldout = (
        (out, args.holdout_to) if args.holdout_to else (f"{out}/train", f"{out}/heldout")
    )
    selection = Selection(
        sources=tuple(args.sources),
        where=args.where or "",
        holdout=args.holdout or 0.0,
        weights=_numbers("--weights", args.weights),
        sample=_sample(args.sample),
        seed=args.seed,
    )
    views = make_views(train if args.holdout else out, heldout, selection)
    for view in views:
        print(view)
    facts = [
        {"url": view.url, "view_hash": view.view_hash, "rows": view.num_rows,
         "tokens": view.num_tokens, "labels": view.num_labels}
        for view in views
    ]  # fmt: skip
    return Outcome(json.dumps({"views": facts}, indent=2))


def _sample(text: str | None) -> float:
    """A share, or a number of rows: "1.0" is everything and "1" one row."""
    if text is None:
        return 0.0
    (value,) = _numbers("--sample", text) or (0.0,)
    everything = value == 1.0 and not text.strip().isdigit()
    if value <= 0.0:
        from schemas.errors import ConfigError

        raise ConfigError(f"--sample is {text!r}; expected a share such as 0.1 or a number of rows")
    return 0.0 if everything else value


def _numbers(option: str, text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in (text or "").split(",") if part.strip())
    except ValueError as error:
        from schemas.errors import ConfigError

        raise ConfigError(f"{option} is {text!r}; expected numbers") from error


def _export(args: argparse.Namespace) -> Outcome:
    from cluster.labels.export.export import export

    done = export(args.url, args.out, args.format, args.tokenizer)
    print(f"{done.out}: {done.rows:,} rows as {done.format}, {len(done.files)} files; {done.note}")
    return Outcome(done.model_dump_json(indent=2))


def _report(args: argparse.Namespace) -> Outcome:
    from cluster.labels.report.html import write_report

    facts = write_report(args.url, args.out, args.groups, args.seed)
    print(f"report: {args.out}")
    return Outcome(json.dumps(facts, indent=2))


def _gc(args: argparse.Namespace) -> Outcome:
    from cluster.labels.terminal import size_text, table
    from schemas.maintenance.garbage import collect_garbage

    found = collect_garbage(args.url, args.older_than, args.delete)
    lines = [
        (file.file, file.why, size_text(file.size_bytes), f"{file.age_hours:.1f} h")
        for file in found.files
    ]
    if lines:
        print(table(("file", "why", "size", "age"), lines, right=(2, 3)))
    what = f"{len(lines)} files, {size_text(found.size_bytes)}, older than {args.older_than:g} h"
    young = f"; {found.too_young} younger ones left alone" if found.too_young else ""
    if found.deleted:
        print(f"{args.url}: deleted {what}{young}")
    else:
        advice = "; --delete removes them" if lines else ""
        print(f"{args.url}: {what}, that no manifest names{young}{advice}")
    return Outcome(found.model_dump_json(indent=2))


def _drop(args: argparse.Namespace) -> Outcome:
    from schemas.label_set.label_set import LabelSet

    LabelSet.open(args.url).drop_unit(args.unit)
    print(f"dropped unit {args.unit}; its rows are labelled again by the next label job")
    return Outcome(json.dumps({"url": args.url, "dropped": args.unit}))


class _Progress:
    """A line on the standard error stream, at most once in two seconds, with the time left."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._started = self._shown = time.monotonic()

    def show(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._shown < 2.0 or not 0 < done < total:
            return
        self._shown = now
        left = (now - self._started) * (total - done) / done
        print(
            f"{self._name}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )


_ACTIONS: dict[str, Callable[[argparse.Namespace], Outcome]] = {
    "ls": _ls,
    "show": _show,
    "verify": _verify,
    "view": _view,
    "export": _export,
    "report": _report,
    "drop": _drop,
    "gc": _gc,
}
