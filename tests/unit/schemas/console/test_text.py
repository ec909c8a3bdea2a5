"""Tables and sizes as text."""

import pytest

from schemas.console.text import size_text, table


def test_tables_line_up() -> None:
    shown = table(("name", "n"), [("a", "10"), ("longer", "2")], right=(1,))
    assert shown.splitlines() == ["name     n", "a       10", "longer   2"]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (75.6e6, "75.6 MB"), (2e15, "2000.0 TB")],
)
def test_sizes(size: float, text: str) -> None:
    assert size_text(size) == text
