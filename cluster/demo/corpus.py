"""The demo's corpus: the running Python's standard library, in three parts.

A hash of the top-level module or package selects the part of a file, so that no package is split
between parts and every Python version puts a file in the same part.
"""

import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Part = Literal["teacher", "students", "heldout"]

# Percentages. The shipped teacher was trained on its part, so these must not change.
PARTS: tuple[tuple[Part, int], ...] = (("teacher", 44), ("students", 44), ("heldout", 12))

# Not hand-written library code: generated tables, test suites, installed packages.
SKIPPED_NAMES = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    | {"__pycache__", "lib-dynload"}
)


def corpus_part(top_level: str) -> Part:
    """The part of a top-level module or package."""
    digest = hashlib.sha256(top_level.encode()).digest()
    point = int.from_bytes(digest[:8], "big") % 100
    for part, share in PARTS:
        if point < share:
            return part
        point -= share
    raise AssertionError("the percentages add up to 100")


def library_files() -> Iterator[tuple[str, Path]]:
    """Yields each source file, sorted, as its path relative to the library and its full path."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        generated = relative.name.startswith("_sysconfigdata")
        if SKIPPED_NAMES.isdisjoint(relative.parts) and not generated:
            yield relative.as_posix(), file


def write_corpus(folder: Path, limits: dict[Part, int]) -> dict[Part, int]:
    """Copies library source into folder/teacher, folder/students and folder/heldout.

    Args:
        folder: parent of the parts; existing files are overwritten.
        limits: the parts to write, each with the size in bytes at which to stop; 0: no limit. Files
            are copied in the order of a hash of their paths, so a limited part is a fair sample.

    Returns:
        Size of each part in bytes.
    """
    sizes = dict.fromkeys(limits, 0)
    for relative, file in sorted(
        library_files(), key=lambda item: hashlib.sha256(item[0].encode()).digest()
    ):
        part = corpus_part(relative.split("/")[0].removesuffix(".py"))
        if part not in limits or (limits[part] and sizes[part] >= limits[part]):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few library files use another encoding on purpose
        if not text.strip():
            continue
        target = folder / part / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        sizes[part] += len(text.encode())
    return sizes


def function_headers(folder: Path, limit: int) -> Iterator[str]:
    """Yields at most `limit` prompts: a function's `def` lines and docstring, without its body."""
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
                if len(header) <= 600:  # leaves room in text.max_tokens for the completion
                    # Sorting by a hash keeps the first prompts from all being from one module.
                    order = hashlib.sha256(header.encode()).hexdigest()
                    headers.append((order, header))
    for _, header in sorted(headers)[:limit]:
        yield header


def write_prompts(folder: Path, path: Path, limit: int) -> int:
    """Writes at most `limit` function headers as JSONL {"prompt": ...}; returns their number."""
    prompts = list(function_headers(folder, limit))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8"
    )
    return len(prompts)
