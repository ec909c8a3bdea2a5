"""Loads TOML files as validated models, and writes them back.

A configuration file describes a complete run. ``key.sub=value`` arguments after it override single
values. Relative paths in a file are relative to the working directory, not to the file.
"""

import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self, TypeVar

import pydantic
import tomli_w
from pydantic import Field

from schemas.console.text import did_you_mean
from schemas.errors import ConfigError

M = TypeVar("M", bound="StrictModel")


class StrictModel(pydantic.BaseModel):
    """Immutable; unknown keys are errors; defaults are validated like given values."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, validate_default=True)


class CountRange(StrictModel):
    """A number of processes that scales with the free capacity of the cluster."""

    min: int = Field(default=1, ge=1, description="processes needed to start")
    max: int = Field(ge=1, description="maximum number of processes")

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, which is more than max, {self.max}")
        return self


Count = Annotated[int, Field(ge=1)] | CountRange


def count_bounds(count: int | CountRange) -> tuple[int, int]:
    """The minimum and maximum that a `Count` allows."""
    return (count, count) if isinstance(count, int) else (count.min, count.max)


def load_toml(path: str, model: type[M], overrides: Sequence[str] = ()) -> M:
    """Reads and validates a configuration file.

    Args:
        path: the TOML file.
        model: class that validates its content.
        overrides: arguments ``key.sub=value``; a value that is not valid TOML is a plain string.

    Raises:
        ConfigError: the file is missing, is not TOML, or is not a valid `model`.
    """
    try:
        with open(path, "rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    for word in overrides:
        _override(content, word)
    where = path if not overrides else f"{path} with {' '.join(overrides)}"
    return validated(content, model, where)


def validated(content: Mapping[str, Any], model: type[M], where: str) -> M:
    """Validates `content` as `model`; the ConfigError names `where` and every invalid key."""
    try:
        return model.model_validate(content)
    except pydantic.ValidationError as error:
        problems = [_explain(detail, model) for detail in error.errors()]
        raise ConfigError(f"{where}: {'; '.join(problems)}") from error


def dump_toml(model: StrictModel) -> str:
    """Serializes a model to TOML that `load_toml` reads back as an equal model; omits None.

    Raises:
        ConfigError: a value is None but its default is not; TOML cannot express that.
    """
    _refuse_unwritable_none(model)
    try:
        return tomli_w.dumps(model.model_dump(mode="json", exclude_none=True))
    except TypeError as error:
        raise ConfigError(f"cannot be written as TOML: {error}") from error


def _override(content: dict[str, Any], word: str) -> None:
    key, equals, text = word.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"override {word!r}: expected key=value or key.sub=value")
    try:
        parsed = tomllib.loads(f"value = {text}")
        value = parsed["value"] if parsed.keys() == {"value"} else text
    except tomllib.TOMLDecodeError:
        value = text
    table = content
    for depth, name in enumerate(names[:-1]):
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            outer = ".".join(names[: depth + 1])
            raise ConfigError(f"override {word!r}: {outer} is a value, not a table of keys")
    table[names[-1]] = value


def _explain(detail: Any, model: type[StrictModel]) -> str:
    loc = tuple(detail["loc"])
    key = ".".join(str(part) for part in loc)
    kind, found = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return _explain_unknown(key, loc, model)
    if kind == "missing":
        return f"{key} is missing and has no default"
    message = str(detail["msg"])
    if kind in ("model_type", "dict_type"):
        return f"{key}: expected a table of keys, found {found!r}"
    if kind == "value_error":
        text = message.removeprefix("Value error, ")
        return text if not key or key in text else f"{key}: {text}"
    expected = message.replace("Input should be ", "expected ", 1)
    return f"{key}: {expected}, found {found!r}"


def _explain_unknown(key: str, loc: tuple[Any, ...], model: type[StrictModel]) -> str:
    allowed = _fields_at(model, loc[:-1])
    hint = did_you_mean(str(loc[-1]), allowed)
    known = f" (known here: {', '.join(allowed)})" if allowed else ""
    return f"unknown key {key}{hint}{known}"


def _fields_at(model: type[StrictModel], loc: tuple[Any, ...]) -> list[str]:
    """Field names of the model at `loc` inside `model`."""
    current: type[pydantic.BaseModel] | None = model
    for part in loc:
        if current is None or isinstance(part, int):
            continue
        field = current.model_fields.get(str(part))
        current = _model_in(field.annotation) if field is not None else None
    return sorted(current.model_fields) if current is not None else []


def _model_in(annotation: Any) -> type[pydantic.BaseModel] | None:
    """The first model class inside an annotation such as ``tuple[Model, ...] | None``."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, pydantic.BaseModel) else None
    for inner in typing.get_args(annotation):
        found = _model_in(inner)
        if found is not None:
            return found
    return None


def _refuse_unwritable_none(model: pydantic.BaseModel, prefix: str = "") -> None:
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if value is None and (field.is_required() or field.get_default() is not None):
            raise ConfigError(f"{prefix}{name} is None, which TOML cannot express")
        if isinstance(value, pydantic.BaseModel):
            _refuse_unwritable_none(value, f"{prefix}{name}.")
