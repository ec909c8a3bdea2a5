"""Configuration files: what is read, what is refused and in which words, and writing them back."""

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, model_validator

from schemas.config import StrictModel, dump_toml, load_toml
from schemas.errors import ConfigError


class Engine(StrictModel):
    name: str = "fast"
    options: dict[str, object] = Field(default_factory=dict)


class Job(StrictModel):
    path: str
    kind: Literal["text", "chat"] = "text"
    max_tokens: int = Field(default=16, ge=2)
    rates: tuple[float, ...] = ()
    limit: int | None = None
    engine: Engine = Engine()
    parts: tuple[Engine, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> "Job":
        if self.path == "nowhere":
            raise ValueError('path is "nowhere"; give one that is somewhere')
        return self


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text('path = "a"\nrates = [1, 2.5]\n[engine]\noptions = {depth = 3}\n')
    return path


def test_config_reads_a_file(file: Path) -> None:
    job = load_toml(str(file), Job)
    assert job == Job(path="a", rates=(1.0, 2.5), engine=Engine(options={"depth": 3}))


@pytest.mark.parametrize(
    ("word", "field", "value"),
    [
        ("max_tokens=99", "max_tokens", 99),
        ("path=b/c", "path", "b/c"),
        ('path="7"', "path", "7"),
        ("rates=[]", "rates", ()),
        ("rates=[0.5]", "rates", (0.5,)),
        ("kind=chat", "kind", "chat"),
        ("path=a\nkind=3", "path", "a\nkind=3"),
        ("path=", "path", ""),
    ],
)
def test_overrides_replace_values(file: Path, word: str, field: str, value: object) -> None:
    assert getattr(load_toml(str(file), Job, [word]), field) == value


def test_override_inside_a_table_keeps_the_rest(file: Path) -> None:
    job = load_toml(str(file), Job, ["engine.options.width=4", "engine.name=slow"])
    assert job.engine == Engine(name="slow", options={"depth": 3, "width": 4})


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        ('path = "a"\nmax_token = 3', [], ["unknown key max_token", "did you mean max_tokens"]),
        ('path = "a"\n[engine]\nnme = 3', [], ["unknown key engine.nme", "did you mean name"]),
        ("kind = 'text'", [], ["path is missing"]),
        ('path = "a"\nmax_tokens = 1', [], ["max_tokens", "greater than or equal to 2", "found 1"]),
        ('path = "a"\nkind = "x"', [], ["kind", "expected 'text' or 'chat'", "found 'x'"]),
        ('path = "a"\nengine = "x"', [], ["engine", "expected a table of keys", "found 'x'"]),
        ('path = "nowhere"', [], ['path is "nowhere"; give one']),
        ("path = ", [], ["not valid TOML"]),
        ('path = "a"', ["max_tokens"], ["override 'max_tokens'", "expected key=value"]),
        ('path = "a"', ["path.x=1"], ["path is a value"]),
        ('path = "a"', ["max_tokens=two"], ["with max_tokens=two", "found 'two'"]),
    ],
)
def test_config_refusal_says_what_and_where(
    file: Path, text: str, overrides: list[str], said: list[str]
) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_toml(str(file), Job, overrides)
    message = str(caught.value)
    assert "\n" not in message
    if "override" not in message:
        assert str(file) in message
    for words in said:
        assert words in message


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read"):
        load_toml(str(tmp_path / "none.toml"), Job)


@pytest.mark.parametrize(
    "job",
    [
        Job(path="a"),
        Job(path='quo"te \\ \n\t\x7f \x01 é 漢', rates=(0.1, 1e-300, float("inf")), limit=3),
        Job(path="a", engine=Engine(options={})),
        Job(path="a", engine=Engine(options={"a b": {"c.d": [1, {"e": True}]}, "x": {}})),
        Job(path="a", parts=(Engine(), Engine(name="b", options={"k": [[]]}))),
    ],
)
def test_dump_reads_back_equal(tmp_path: Path, job: Job) -> None:
    path = tmp_path / "dumped.toml"
    path.write_text(dump_toml(job), encoding="utf-8")
    assert load_toml(str(path), Job) == job


def test_dump_refuses_what_toml_cannot_say() -> None:
    class Odd(StrictModel):
        limit: int | None = 5

    with pytest.raises(ConfigError, match="limit is None"):
        dump_toml(Odd(limit=None))
