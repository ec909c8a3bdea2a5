"""TOML files into checked models, and back.

A configuration file is a whole run by itself. ``key.sub=value`` words after it replace single
values. Relative paths in a file are relative to the working directory, not to the file.
"""

import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import pydantic

from schemas.errors import ConfigError

M = TypeVar("M", bound="StrictModel")


class StrictModel(pydantic.BaseModel):
    """Immutable; unknown keys are errors; defaults are checked like given values."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, validate_default=True)


def load_toml(path: str, model: type[M], overrides: Sequence[str] = ()) -> M:
    """Reads and checks a configuration file.

    Args:
        path: the TOML file.
        model: what the file describes.
        overrides: words ``key.sub=value``; the value is read as TOML, and as a plain string
            where it is not TOML.

    Raises:
        ConfigError: the file is missing, is not TOML, or does not describe a valid `model`.
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
    """`content` as a checked `model`; a ConfigError names `where` and every key that is wrong."""
    try:
        return model.model_validate(content)
    except pydantic.ValidationError as error:
        problems = [_explain(detail, model) for detail in error.errors()]
        raise ConfigError(f"{where}: {'; '.join(problems)}") from error


def dump_toml(model: StrictModel) -> str:
    """The whole model as TOML that `load_toml` reads back to an equal one; None is left out.

    Raises:
        ConfigError: a value is None where the default is not, which TOML cannot say.
    """
    _refuse_unspeakable_none(model)
    lines: list[str] = []
    _write_table(model.model_dump(mode="json", exclude_none=True), (), lines)
    return "\n".join(lines).strip() + "\n"


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
    near = difflib.get_close_matches(str(loc[-1]), allowed, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    known = f" (known here: {', '.join(allowed)})" if allowed else ""
    return f"unknown key {key}{hint}{known}"


def _fields_at(model: type[StrictModel], loc: tuple[Any, ...]) -> list[str]:
    """Names of the fields of the model that stands at `loc` inside `model`."""
    here: type[pydantic.BaseModel] | None = model
    for part in loc:
        if here is None or isinstance(part, int):
            continue
        field = here.model_fields.get(str(part))
        here = _model_in(field.annotation) if field is not None else None
    return sorted(here.model_fields) if here is not None else []


def _model_in(annotation: Any) -> type[pydantic.BaseModel] | None:
    """The first model class inside an annotation such as ``tuple[Model, ...] | None``."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, pydantic.BaseModel) else None
    for inner in typing.get_args(annotation):
        found = _model_in(inner)
        if found is not None:
            return found
    return None


def _refuse_unspeakable_none(model: pydantic.BaseModel, prefix: str = "") -> None:
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if value is None and (field.is_required() or field.get_default() is not None):
            raise ConfigError(f"{prefix}{name} is None, which TOML cannot say")
        if isinstance(value, pydantic.BaseModel):
            _refuse_unspeakable_none(value, f"{prefix}{name}.")


def _write_table(table: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    plain = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    # A table without keys of its own still has to be named, or an empty one would be lost.
    if path and (plain or len(plain) == len(table)):
        lines.extend(["", f"[{'.'.join(_toml_key(name) for name in path)}]"])
    lines.extend(f"{_toml_key(key)} = {_toml_value(value)}" for key, value in plain.items())
    for key, value in table.items():
        if isinstance(value, Mapping):
            _write_table(value, (*path, key), lines)


def _toml_key(key: str) -> str:
    bare = key and all(c.isascii() and (c.isalnum() or c in "-_") for c in key)
    return key if bare else _toml_value(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        pairs = (f"{_toml_key(key)} = {_toml_value(inner)}" for key, inner in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(_toml_value(inner) for inner in value) + "]"
    raise ConfigError(f"a {type(value).__name__} cannot be written as TOML")
