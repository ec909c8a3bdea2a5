"""Runs the actions of `tutelage labels` and prints their results."""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Result = tuple[str, int]  # the summary as JSON, and the exit code


def run_action(args: argparse.Namespace) -> Result:
    """Runs one action and prints its result.

    Raises:
        TutelageError: the action failed.
    """
    return _ACTIONS[args.action](args)


def _ls(args: argparse.Namespace) -> Result:
    from schemas.console.text import size_text, table
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
    return _json({"label_sets": [entry.model_dump() for entry in entries]})


def _show(args: argparse.Namespace) -> Result:
    from cluster.labels.show.show import show

    text, facts = show(args.url, args.groups, args.rows, args.positions, args.seed)
    print(text)
    return _json(facts)


def _verify(args: argparse.Namespace) -> Result:
    from schemas.console.text import count_text, size_text
    from schemas.maintenance.verify import verify

    started = time.monotonic()
    with _progress("verify", "checked {} of {}", size_text) as progress:
        result = verify(args.url, progress)
    for problem in result.problems:
        print(f"{problem.what}: {problem.line()}")
    # A damaged unit often has several problems but only one repair.
    for repair in dict.fromkeys(problem.repair for problem in result.problems):
        print(f"fix: {repair}")
    verdict = "OK:"
    if result.problems:
        verdict = count_text(len(result.problems), "problem")
        if result.units_to_drop:
            verdict += f" in {len(result.units_to_drop)} of {count_text(result.units, 'unit')}"
        verdict += ";"
    shards = count_text(result.garbage, "shard")
    garbage = f"; {shards} not in any manifest" if result.garbage else ""
    print(
        f"{args.url}: {verdict} checked {count_text(result.units, 'unit')}, "
        f"{count_text(result.rows, 'row')}, {count_text(result.labels, 'label')}, "
        f"{count_text(result.bytes, 'byte')} in "
        f"{time.monotonic() - started:.1f} s{garbage}"
    )
    return result.model_dump_json(indent=2), 1 if result.problems else 0


def _view(args: argparse.Namespace) -> Result:
    from schemas.errors import ConfigError
    from schemas.views.select import Selection, make_views

    if args.holdout_to and not args.holdout:
        raise ConfigError("--holdout-to needs --holdout, the fraction of documents to hold out")
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
    with _progress("view", "read {} of {} units") as progress:
        views = make_views(train if args.holdout else out, heldout, selection, progress)
    for view in views:
        print(view)
    facts = [
        {"url": view.url, "view_hash": view.view_hash, "rows": view.num_rows,
         "tokens": view.num_tokens, "labels": view.num_labels}
        for view in views
    ]  # fmt: skip
    return _json({"views": facts})


def _sample(text: str | None) -> float:
    """A fraction or a number of rows; 0 for all, as in `Selection.sample`.

    "1" means one row, "1.0" the fraction that keeps every row.
    """
    if text is None:
        return 0.0
    (value,) = _numbers("--sample", text) or (0.0,)
    if value <= 0.0:
        from schemas.errors import ConfigError

        raise ConfigError(
            f"--sample is {text!r}; expected a fraction such as 0.1 or a number of rows"
        )
    return 0.0 if value == 1.0 and not text.strip().isdigit() else value


def _numbers(option: str, text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in (text or "").split(",") if part.strip())
    except ValueError as error:
        from schemas.errors import ConfigError

        raise ConfigError(f"{option} is {text!r}; expected numbers") from error


def _export(args: argparse.Namespace) -> Result:
    from cluster.labels.export.export import export
    from schemas.console.text import count_text

    with _progress("export", "wrote {} of {} rows") as progress:
        done = export(args.url, args.out, args.format, args.tokenizer, progress)
    rows, files = count_text(done.rows, "row"), count_text(len(done.files), "file")
    print(f"{done.out}: {rows} as {done.format}, {files}; {done.note}")
    return done.model_dump_json(indent=2), 0


def _report(args: argparse.Namespace) -> Result:
    from cluster.labels.report.html import write_report

    with _progress("report", "read {} of {} row groups") as progress:
        facts = write_report(args.url, args.out, args.groups, args.seed, progress)
    print(f"report: {args.out}")
    return _json(facts)


def _drop(args: argparse.Namespace) -> Result:
    from schemas.label_set.label_set import LabelSet

    LabelSet.open(args.url).drop_unit(args.unit)
    print(f"dropped unit {args.unit}; the next label job labels its rows again")
    return _json({"url": args.url, "dropped": args.unit})


def _gc(args: argparse.Namespace) -> Result:
    from schemas.console.text import count_text, size_text, table
    from schemas.maintenance.garbage import collect_garbage

    with _progress("gc", "deleted {} of {} files") as progress:
        found = collect_garbage(args.url, args.older_than, args.delete, progress=progress)
    lines = [
        (file.file, file.why, size_text(file.size_bytes), f"{file.age_hours:.1f} h")
        for file in found.files
    ]
    if lines:
        print(table(("file", "why", "size", "age"), lines, right=(2, 3)))
    files = count_text(len(lines), "file")
    what = f"{files}, {size_text(found.size_bytes)}, older than {args.older_than:g} h"
    young = f"; kept {found.too_young} younger" if found.too_young else ""
    if found.deleted:
        print(f"{args.url}: deleted {what}{young}")
    else:
        advice = "; delete them with --delete" if lines else ""
        print(f"{args.url}: {what}, not in any manifest{young}{advice}")
    return found.model_dump_json(indent=2), 0


@contextmanager
def _progress(
    name: str, what: str, number: Callable[[int], str] = "{:,}".format
) -> Iterator[Callable[[int, int], None]]:
    """Yields a callback(done, total); both fill the placeholders in `what`."""
    from schemas.console.progress import Progress

    with Progress(name, brief=True) as progress:
        yield lambda done, total: progress.show(
            done, total, what.format(number(done), number(total))
        )


def _json(facts: dict[str, object]) -> Result:
    return json.dumps(facts, indent=2), 0


_ACTIONS: dict[str, Callable[[argparse.Namespace], Result]] = {
    "ls": _ls,
    "show": _show,
    "verify": _verify,
    "view": _view,
    "export": _export,
    "report": _report,
    "drop": _drop,
    "gc": _gc,
}
