"""Every import contract of pyproject.toml fails on the imports that it forbids."""

import ast
import itertools
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

LINTER = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
PACKAGES = LINTER["root_packages"]
CONTRACTS = {contract["id"]: contract for contract in LINTER["contracts"]}

Import = tuple[str, str]
"""Importing module, imported module."""


def layer_breaches(contract: dict[str, Any]) -> Iterator[Import]:
    """Every layer imports every one above it, and siblings kept apart by ``|`` each other."""
    for container in contract.get("containers", [""]):
        prefix = f"{container}." if container else ""
        layers = [
            [prefix + name for name in re.split(r" [|:] ", layer)] for layer in contract["layers"]
        ]
        for above, below in itertools.combinations(layers, 2):
            yield from itertools.product(below, above)
        for layer, names in zip(contract["layers"], layers, strict=True):
            if "|" in layer:
                yield from itertools.permutations(names, 2)


def forbidden_breaches(contract: dict[str, Any]) -> Iterable[Import]:
    return itertools.product(contract["source_modules"], contract["forbidden_modules"])


def protected_breaches(contract: dict[str, Any]) -> Iterator[Import]:
    """Every module outside of the allowed rooms imports what is protected."""
    allowed = tuple(f"{name}." for name in contract["allowed_importers"])
    for module in modules():
        if not f"{module}.".startswith(allowed):
            yield from ((module, name) for name in contract["protected_modules"])


def circle_breaches(contract: dict[str, Any]) -> Iterator[Import]:
    """Two rooms of each package import each other, and so do the first two modules of a room."""
    for package in contract["ancestors"]:
        rooms = children(package)
        yield from itertools.permutations((rooms[0], rooms[-1]))
        yield from itertools.permutations(next(filter(len, map(children, rooms)))[:2])


BREACHES: dict[str, Callable[[dict[str, Any]], Iterable[Import]]] = {
    "layers": layer_breaches,
    "forbidden": forbidden_breaches,
    "protected": protected_breaches,
    "acyclic_siblings": circle_breaches,
}


def modules() -> list[str]:
    files = [path.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    return sorted(
        ".".join(path.parts[:-1] if path.stem == "__init__" else path.with_suffix("").parts)
        for path in files
    )


def children(package: str) -> list[str]:
    return [name for name in modules() if name.rpartition(".")[0] == package]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def plant(copy: Path, importer: str, imported: str) -> None:
    path = copy / importer.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    with path.open("a") as file:
        file.write(f"\nimport {imported}\n")


def lint(copy: Path, *words: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lint-imports")
    return subprocess.run(
        [program, "--no-cache", *words], cwd=copy, capture_output=True, text=True, check=False
    )


def test_packages_keep_all_contracts(copy: Path) -> None:
    done = lint(copy)
    assert done.returncode == 0, done.stdout
    assert f"Contracts: {len(CONTRACTS)} kept, 0 broken." in done.stdout


@pytest.mark.parametrize("contract_id", CONTRACTS)
def test_contract_fails_on_every_import_that_it_forbids(contract_id: str, copy: Path) -> None:
    contract = CONTRACTS[contract_id]
    breaches = list(BREACHES[contract["type"]](contract))
    assert breaches
    for breach in breaches:
        plant(copy, *breach)
    done = lint(copy, "--contract", contract_id)
    assert done.returncode == 1, done.stdout
    assert f"{contract['name']} BROKEN" in done.stdout
    for importer, imported in breaches:
        if contract["type"] == "acyclic_siblings":
            parent = importer.rpartition(".")[0]
            assert f"No cycles are allowed in {parent}." in done.stdout
        else:
            assert f"{importer} -> {imported} (l." in done.stdout


@pytest.mark.parametrize(
    "contract_id", [name for name, contract in CONTRACTS.items() if contract.get("exhaustive")]
)
def test_exhaustive_contract_fails_on_a_room_without_a_layer(contract_id: str, copy: Path) -> None:
    (container,) = CONTRACTS[contract_id]["containers"]
    (copy / container / "attic.py").touch()
    done = lint(copy, "--contract", contract_id)
    assert done.returncode == 1, done.stdout
    assert f"{container}.attic" in done.stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_room_has_at_most_twelve_modules_and_says_what_lives_there(package: str) -> None:
    rooms = {file.parent for file in (ROOT / package).rglob("*.py")}
    for room in sorted(rooms):
        modules = [file.name for file in room.glob("*.py") if not file.name.startswith("__")]
        assert len(modules) <= 12, f"{room.relative_to(ROOT)}: {len(modules)} modules"
        assert ast.get_docstring(ast.parse((room / "__init__.py").read_text())), room
