"""What stays light to import: the schemas, configurations, and the command line's help."""

import subprocess
import sys

import pytest

from tests.support import ROOT

ENGINES = {"torch", "ray", "vllm", "transformers", "deepspeed"}
ALL_SCHEMAS = """
import importlib, pkgutil, schemas
names = [module.name for module in pkgutil.walk_packages(schemas.__path__, "schemas.")]
assert "schemas.record.rows" in names, names
for name in names:
    importlib.import_module(name)
"""
HELP = """
import runpy, sys
sys.argv = {words!r}
try:
    runpy.run_module("cluster", run_name="__main__", alter_sys=True)
except SystemExit as exit:
    assert not exit.code
"""


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        pytest.param(ALL_SCHEMAS, {*ENGINES, "pandas"}, id="schemas"),
        pytest.param("import labeler.config", ENGINES, id="labeler.config"),
        pytest.param("import trainer.config.train", ENGINES, id="trainer.config.train"),
        pytest.param("import trainer.config.evaluate", ENGINES, id="trainer.config.evaluate"),
        pytest.param("import labeler.run.job", ENGINES, id="labeler.run.job"),
        *(
            pytest.param(
                HELP.format(words=["tutelage", *words, "--help"]),
                {*ENGINES, "pydantic", "pyarrow", "numpy"},
                id=" ".join(["tutelage", *words, "--help"]),
            )
            for words in ([], ["label"], ["train"], ["evaluate"])
        ),
    ],
)
def test_import_loads_no_heavy_library(code: str, heavy: set[str]) -> None:
    check = f"\nimport sys\nsys.exit(', '.join({heavy!r} & set(sys.modules)) or 0)"
    done = subprocess.run(
        [sys.executable, "-c", code + check], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
