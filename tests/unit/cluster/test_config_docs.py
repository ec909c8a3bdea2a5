"""The configuration reference and the JSON Schemas agree with the models and with each other."""

import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from cluster.config_docs import __main__ as config_docs
from cluster.config_docs.reference import reference
from cluster.config_docs.schema import COMMANDS, json_schema, undescribed

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = sorted((ROOT / "examples").rglob("*.toml"))


def errors(path: Path, content: dict[str, Any]) -> list[str]:
    prefix = path.stem.partition("_")[0]
    schema = json_schema(prefix if prefix in COMMANDS else "label")
    Draft7Validator.check_schema(schema)
    return [error.message for error in Draft7Validator(schema).iter_errors(content)]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_schema_accepts_the_examples_and_rejects_a_misspelt_key(path: Path) -> None:
    assert errors(path, tomllib.loads(path.read_text())) == []
    text = path.read_text()
    for key, misspelt in (("view = ", "veiw = "), ("max_tokens = ", "max_token = ")):
        if key in text:
            found = errors(path, tomllib.loads(text.replace(key, misspelt, 1)))
            assert any(misspelt.removesuffix(" = ") in message for message in found)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_key_is_described(command: str) -> None:
    assert undescribed(command) == []


def test_reference_has_a_line_for_every_key() -> None:
    lines = reference().splitlines()
    for command in COMMANDS:
        schema = json_schema(command)
        for model in (schema, *schema["$defs"].values()) if "$defs" in schema else (schema,):
            for key in model["properties"]:
                assert any(line.startswith(f"| `{key}` | ") for line in lines), key
    assert "### `[teacher.remote]`" in lines
    assert "### `[[view]]`" in lines


def test_check_names_stale_files_and_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(config_docs, "DOCS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["config_docs"])
    assert config_docs.main() == 0
    monkeypatch.setattr(sys, "argv", ["config_docs", "--check"])
    assert config_docs.main() == 0
    (tmp_path / "config.md").write_text("old")
    (tmp_path / "schemas" / "train.schema.json").unlink()
    assert config_docs.main() == 1
    shown = capsys.readouterr().err.splitlines()
    assert [Path(line.partition(":")[0]).name for line in shown] == [
        "config.md",
        "train.schema.json",
    ]
    assert all("run `make config-docs`" in line for line in shown)
