"""Pages name files, code and configuration keys that exist, and show measured figures only."""

import ast
import json
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
from pydantic import BaseModel

from benchmarks.render import BLOCK, REPORT, RESULTS, rendered
from labeler.config import LabelConfig
from trainer.config.evaluate import EvaluateConfig
from trainer.config.train import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "config.md"),
]
PACKAGES = ("schemas", "labeler", "trainer", "cluster", "benchmarks")
FOLDERS = (*PACKAGES, "examples", "tests", "docs")
README_BYTES = 8192

CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#]*)(#[^)]*)?\)")
DOTTED = re.compile(rf"(?<![\w/.])(?:{'|'.join(PACKAGES)})(?:\.\w+)+")
FILE = re.compile(rf"(?<![\w/.])(?:{'|'.join(FOLDERS)})/[\w./*-]*")
KEY = re.compile(r"[a-z_]+(?:\.[a-z_]+)+")
MEASURED = re.compile(r"\d ?(?:%|tokens/s|[kMG]i?B\b|us\b|ms\b|min\b)")


def on_every_page(test):
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)(test)


@on_every_page
def test_docs_name_files_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = {name.rstrip("./") for name in FILE.findall(text)}
    assert [name for name in sorted(named) if not list(ROOT.glob(name))] == []


@on_every_page
def test_named_code_exists(page: Path) -> None:
    names = {name for code in CODE.findall(page.read_text()) for name in DOTTED.findall(code)}
    assert [name for name in sorted(names) if not is_defined(name)] == []


@on_every_page
def test_named_configuration_keys_exist(page: Path) -> None:
    names = {code for code in CODE.findall(page.read_text()) if KEY.fullmatch(code)}
    assert [name for name in sorted(names) if not is_key(name)] == []


@on_every_page
def test_links_lead_somewhere(page: Path) -> None:
    targets = [
        (target, anchor) for target, anchor in LINK.findall(page.read_text()) if "://" not in target
    ]
    for target, anchor in targets:
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        assert not anchor or anchor[1:] in anchors(path), target + anchor


@on_every_page
def test_rendered_figures_are_those_of_the_results_files(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == rendered(page)


@on_every_page
def test_figures_stand_only_in_rendered_text(page: Path) -> None:
    if page == ROOT / REPORT:
        return
    prose = re.sub(r"```.*?```", "", BLOCK.sub("", page.read_text()), flags=re.DOTALL)
    assert [line for line in prose.splitlines() if MEASURED.search(line)] == []


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_results_file_names_its_run(path: Path) -> None:
    run = json.loads(path.read_text(encoding="utf-8"))
    assert {"name", "command", "date", "machine", "versions", "settings", "results"} <= set(run)
    assert path.stem.startswith(run["name"])


@pytest.mark.parametrize("package", ["labeler", "trainer", "schemas"])
def test_contributing_shows_the_layers_of_the_import_contracts(package: str) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    layers = next(one["layers"] for one in contracts if one.get("containers") == [package])
    rooms = [", ".join(f"`{room}`" for room in re.findall(r"\w+", layer)) for layer in layers]
    assert f"| `{package}` | {' > '.join(rooms)} |" in (ROOT / "CONTRIBUTING.md").read_text()


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= README_BYTES


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}


def is_key(name: str) -> bool:
    """Whether a dotted name is a configuration key; true of what begins like none."""
    first, *rest = name.split(".")
    models = [
        annotation
        for config in (LabelConfig, TrainConfig, EvaluateConfig)
        if first in config.model_fields
        for annotation in models_in(config.model_fields[first].annotation)
    ]
    return not models or any(has_field(model, rest) for model in models)


def has_field(model: type[BaseModel], names: list[str]) -> bool:
    if not names or names[0] not in model.model_fields:
        return not names
    inner = models_in(model.model_fields[names[0]].annotation)
    return not inner or len(names) == 1 or any(has_field(one, names[1:]) for one in inner)


def models_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in models_in(part)]


def is_defined(name: str) -> bool:
    """Whether a dotted name is a module, or defined at the top of one or in a class there."""
    path, names = ROOT, name.split(".")
    while names and (path / names[0]).is_dir():
        path /= names.pop(0)
    if names and (path / f"{names[0]}.py").exists():
        path /= f"{names.pop(0)}.py"
    elif path.is_dir():
        path /= "__init__.py"
    return not names or (path.exists() and ".".join(names) in definitions(path))


@cache
def definitions(path: Path) -> set[str]:
    """Names at the top level of a module, and `Class.name` of those in its classes."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        found |= set(bound_names(node))
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}" for inner in node.body for name in bound_names(inner)}
    return found


def bound_names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
    return [target.id for target in targets if isinstance(target, ast.Name)]
