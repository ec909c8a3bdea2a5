"""The command line before any heavy import: help, bad words, one-line errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.__main__ import main


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster", *words], capture_output=True, text=True, check=False
    )


def test_help_lists_the_commands() -> None:
    done = run("--help")
    assert done.returncode == 0, done.stderr
    for command in ("label", "train", "evaluate", "labels", "demo"):
        assert f"  {command} " in done.stdout


def test_no_command_is_a_usage_error() -> None:
    done = run()
    assert done.returncode == 2
    assert "COMMAND" in done.stderr


@pytest.mark.parametrize("command", ["label", "train", "evaluate"])
def test_missing_config_is_one_line(command: str) -> None:
    done = run(command, "no/such/file.toml")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "no/such/file.toml" in done.stderr
    assert done.stderr.count("\n") == 1


def test_unknown_key_names_the_key_and_the_nearest(tmp_path: Path) -> None:
    config = tmp_path / "label.toml"
    config.write_text(
        'labels = "x"\n[corpus]\npath = "y"\nformatt = "text"\n'
        '[teacher]\nbackend = "vllm"\nmodel = "m"\n'
    )
    done = run("label", str(config))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    for word in ("corpus.formatt", "format", str(config)):
        assert word in done.stderr


def test_submit_refuses_a_config_that_would_not_travel(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "label.toml"
    config.write_text("")
    other = tmp_path / "other"
    other.mkdir()
    assert main(["submit", "label", str(config), "--working-dir", str(other)]) == 1
    assert "--working-dir" in capsys.readouterr().err


def test_json_is_written_atomically(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out.json"
    (tmp_path / "empty").mkdir()
    assert main(["labels", "ls", str(tmp_path / "empty"), "--json", str(target)]) == 0
    assert json.loads(target.read_text()) == {"label_sets": []}
    assert [path.name for path in target.parent.iterdir()] == ["out.json"]


@pytest.mark.parametrize(
    "words", [["labels", "ls", "s3://bucket/x"], ["labels", "verify", "s3://bucket/x"]]
)
def test_bucket_without_credentials_is_one_line(words: list[str], tmp_path: Path) -> None:
    pytest.importorskip("s3fs", reason="pip install 'tutelage[s3]'")
    environment = {name: value for name, value in os.environ.items() if "AWS" not in name}
    environment |= {"HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}
    done = subprocess.run(
        [sys.executable, "-m", "cluster", *words], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: s3://bucket/x")
    assert "Unable to locate credentials" in done.stderr
    assert "check credentials" in done.stderr
    assert done.stderr.count("\n") == 1


def test_unwritable_summary_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "out.json")

    words = ["labels", "ls", str(tmp_path), "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr(os, "fsync", fail)
    assert main(words) == 1
    assert "/out.json: cannot be written (Permission denied)" in capsys.readouterr().err
    monkeypatch.setattr(Path, "mkdir", fail)
    assert main(words) == 1
    assert f"{tmp_path}: cannot be created (Permission denied)" in capsys.readouterr().err
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 1
    assert "Permission denied: 'out.json'; check the permissions" in capsys.readouterr().err
