"""The demo's corpus: the running Python's own standard library source, in three disjoint parts.

The part of a file follows from a hash of its top-level module or package, so that code of one
package never stands in two parts, and a file falls in the same part under every version of Python.
"""

import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Part = Literal["teacher", "students", "heldout"]

# Shares of 100: the teacher's and the students' halves are equal.
PARTS: tuple[tuple[Part, int], ...] = (("teacher", 44), ("students", 44), ("heldout", 12))

# Not source that a person wrote to be read: generated tables, test suites, other people's packages.
SKIPPED_NAMES = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    | {"__pycache__", "lib-dynload"}
)


def part_of(top_level: str) -> Part:
    """The part that a top-level module or package belongs to."""
    digest = hashlib.sha256(top_level.encode()).digest()
    point = int.from_bytes(digest[:8], "big") % 100
    for part, share in PARTS:
        if point < share:
            return part
        point -= share
    raise AssertionError("the shares add up to 100")


def library_files() -> Iterator[tuple[str, Path]]:
    """Yields (path below the library's root, file) of each source file, in order."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        generated = relative.name.startswith("_sysconfigdata")
        if SKIPPED_NAMES.isdisjoint(relative.parts) and not generated:
            yield relative.as_posix(), file


def write_corpus(folder: Path, limits: dict[Part, int]) -> dict[Part, int]:
    """Copies the library's source into folder/teacher, folder/students and folder/heldout.

    Args:
        folder: where the parts go; files that are there already are written again.
        limits: the parts wanted, with the bytes of text after which each is full; 0: no limit.
            Files are taken in the order of a hash of their paths, so a part that is cut short is a
            fair sample of the whole.

    Returns:
        Bytes of text in each part.
    """
    sizes = dict.fromkeys(limits, 0)
    for relative, file in sorted(
        library_files(), key=lambda item: hashlib.sha256(item[0].encode()).digest()
    ):
        part = part_of(relative.split("/")[0].removesuffix(".py"))
        if part not in limits or (limits[part] and sizes[part] >= limits[part]):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few files of the library are in another encoding on purpose
        if not text.strip():
            continue
        target = folder / part / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        sizes[part] += len(text.encode())
    return sizes


def function_headers(folder: Path, limit: int) -> Iterator[str]:
    """Yields prompts that end after a function's `def` line and docstring, from all files."""
    headers: list[tuple[str, str]] = []
    for file in sorted(folder.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        lines = text.splitlines(keepends=True)
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
                header = "".join(lines[node.lineno - 1 : node.body[0].end_lineno])
                if len(header) <= 600:
                    order = hashlib.sha256(header.encode()).hexdigest()
                    headers.append((order, header))
    for _, header in sorted(headers)[:limit]:
        yield header


def write_prompts(folder: Path, path: Path, limit: int) -> int:
    """Writes function headers found below `folder` as JSONL {"prompt": ...}; returns how many."""
    prompts = list(function_headers(folder, limit))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8"
    )
    return len(prompts)
