"""Renders every measured figure of README.md and docs/ from `benchmarks/results/`.

`python -m benchmarks.render` writes the pages; `--check` fails if one is out of date.

`docs/benchmarks.md` is rendered from `benchmarks/templates/benchmarks.md.j2`. In other pages, a
template fills the text from `<!-- figures: TEMPLATE ARGUMENT ... -->` to `<!-- /figures -->`.
Templates call `newest(name)` and `runs(name)` for results files, and `file(path)` for examples.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TEMPLATES = ROOT / "benchmarks" / "templates"
REPORT = "docs/benchmarks.md"
BLOCK = re.compile(r"(<!-- figures: (.+?) -->\n).*?(<!-- /figures -->)", re.DOTALL)


def runs(name: str) -> list[dict[str, Any]]:
    """All results files of a benchmark, newest first.

    Raises:
        LookupError: no file has that name.
    """
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")]
    found = [content for content in contents if content["name"] == name]
    if not found:
        raise LookupError(f"no file in {RESULTS} is named {name!r}; measure it, or drop the figure")
    return sorted(found, key=lambda content: str(content["date"]), reverse=True)


def newest(name: str) -> dict[str, Any]:
    """The newest results file of a benchmark."""
    return runs(name)[0]


def provenance(run: dict[str, Any]) -> str:
    """Formats the machine, date and versions of a run as one clause."""
    machine = run["machine"]
    cpu = machine.get("cpu") or "machine not recorded"
    note = f" ({machine['note']})" if machine.get("note") else ""
    cores = f"{machine['cores']} cores{note}" if machine.get("cores") else ""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    command = f"`{run['command']}`" if run["command"] else ""
    parts = (run["date"], cpu, cores, versions, command)
    return ", ".join(part for part in parts if part)


def render(template: str, *arguments: str) -> str:
    """Fills one template.

    Args:
        template: name of a file in `benchmarks/templates`, without its ending.
        arguments: passed to the template as `arguments`.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown from files of this repository
    )
    environment.globals.update(
        runs=runs,
        newest=newest,
        provenance=provenance,
        percents=lambda shares: ", ".join(f"{100 * share:.0f}%" for share in shares),
        exp=math.exp,
        file=lambda path: (ROOT / path).read_text(encoding="utf-8"),
    )
    return environment.get_template(f"{template}.md.j2").render(arguments=arguments)


def rendered(page: Path) -> str:
    """Renders the current text of a page."""
    if page == ROOT / REPORT:
        return render("benchmarks")
    return BLOCK.sub(
        lambda block: f"{block[1]}{render(*block[2].split())}{block[3]}",
        page.read_text(encoding="utf-8"),
    )


def main() -> int:
    """Renders or checks all pages; returns 1 if `--check` finds one out of date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.render", description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if a page is out of date")
    check = parser.parse_args().check
    stale = 0
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = rendered(page)
        if text == page.read_text(encoding="utf-8"):
            continue
        if check:
            print(f"{page.relative_to(ROOT)} is out of date: run python -m benchmarks.render")
            stale = 1
        else:
            page.write_text(text, encoding="utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(main())
