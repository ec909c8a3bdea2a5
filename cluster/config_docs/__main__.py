"""Writes docs/config.md and docs/schemas: `python -m cluster.config_docs [--check]`."""

import argparse
import json
import sys
from pathlib import Path

from cluster.config_docs.reference import reference
from cluster.config_docs.schema import COMMANDS, json_schema

DOCS = Path(__file__).resolve().parents[2] / "docs"


def generated() -> dict[Path, str]:
    """The content of each generated file."""
    schemas = {
        DOCS / "schemas" / f"{command}.schema.json": json.dumps(json_schema(command), indent=2)
        for command in COMMANDS
    }
    return {DOCS / "config.md": reference(), **{k: f"{v}\n" for k, v in schemas.items()}}


def main() -> int:
    """Writes the files, or with --check reports stale ones; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cluster.config_docs", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only report files that are stale")
    check = parser.parse_args().check
    stale = [
        path
        for path, text in generated().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    for path in stale:
        if check:
            print(f"{path}: stale; run `make config-docs` and commit the result", file=sys.stderr)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(generated()[path], encoding="utf-8")
            print(f"wrote {path}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
