"""The demo's corpus: disjoint parts, stable under the version of Python, prompts that parse."""

import ast
import json
from pathlib import Path

from cluster.demo.corpus import corpus_part, library_files, write_corpus, write_prompts


def test_top_level_name_decides_the_part() -> None:
    # Pinned: the teacher that is kept in examples/ was trained on this split.
    assert [corpus_part(name) for name in ("asyncio", "json", "typing", "pdb", "email")] == [
        "teacher",
        "teacher",
        "students",
        "heldout",
        "teacher",
    ]


def test_parts_are_disjoint_and_cover_the_library(tmp_path: Path) -> None:
    write_corpus(tmp_path, {"teacher": 0, "students": 0, "heldout": 0})
    parts = {
        part: {
            path.relative_to(tmp_path / part).parts[0] for path in (tmp_path / part).rglob("*.py")
        }
        for part in ("teacher", "students", "heldout")
    }
    assert not parts["teacher"] & parts["students"]
    assert not parts["teacher"] & parts["heldout"]
    assert not parts["students"] & parts["heldout"]
    assert sum(1 for _ in tmp_path.rglob("*.py")) > 0.9 * sum(1 for _ in library_files())


def test_limit_cuts_a_part_short(tmp_path: Path) -> None:
    sizes = write_corpus(tmp_path, {"students": 200_000})
    assert set(sizes) == {"students"}
    assert 200_000 <= sizes["students"] < 500_000
    assert not (tmp_path / "teacher").exists()


def test_prompts_end_with_a_docstring(tmp_path: Path) -> None:
    write_corpus(tmp_path, {"students": 500_000})
    count = write_prompts(tmp_path / "students", tmp_path / "prompts.jsonl", 20)
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert count == len(rows) == 20
    for row in rows:
        assert isinstance(ast.parse(row["prompt"]).body[0], ast.FunctionDef)
