"""Durations, sizes, counts, hints and tables as text."""

import difflib
from collections.abc import Iterable, Sequence


def duration_text(seconds: float) -> str:
    """Formats seconds in at most two units: 42s, 3m05s, 2h07m."""
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    return f"{total // 3600}h{total % 3600 // 60:02d}m"


def size_text(size_bytes: float) -> str:
    """Formats bytes in the largest decimal unit that gives at least 1."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def count_text(count: int, noun: str) -> str:
    """Formats a count with its noun: 1 row, 1,581 rows."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggests the known name closest to a mistyped one; empty if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def table(head: Sequence[str], lines: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Formats a table, each column as wide as its widest cell.

    Args:
        head: column names.
        lines: the cells of each row, one per column.
        right: indices of right-aligned columns.
    """
    rows = [tuple(head), *(tuple(line) for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
