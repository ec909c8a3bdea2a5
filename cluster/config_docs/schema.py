"""JSON Schemas of the three configuration files, for TOML editors."""

from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from labeler.config import LabelConfig
from schemas.config import StrictModel
from trainer.config.evaluate import EvaluateConfig
from trainer.config.train import TrainConfig

COMMANDS: dict[str, tuple[type[StrictModel], str]] = {
    "label": (LabelConfig, "a corpus, a teacher, and which labels to store"),
    "train": (TrainConfig, "a view of labels, a student, and how to train it"),
    "evaluate": (EvaluateConfig, "students to compare with their teacher on held-out rows"),
}
"""Commands that read a configuration file, each with the file's model and description."""


class _TomlJsonSchema(GenerateJsonSchema):
    """Generates schemas for TOML editors.

    They never allow null, which TOML cannot express; optional keys are simply absent. The dialect
    is draft-07, the newest that taplo's validator supports.
    """

    schema_dialect = "http://json-schema.org/draft-07/schema#"

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        generated = super().default_schema(schema)
        if generated.get("default") is None or isinstance(generated["default"], dict):
            generated.pop("default", None)  # a table's keys have their own defaults
        return generated

    def tuple_schema(self, schema: core_schema.TupleSchema) -> JsonSchemaValue:
        generated = super().tuple_schema(schema)
        if "prefixItems" in generated:
            generated["items"] = generated.pop("prefixItems")  # the name in draft-07
        return generated

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False  # a title such as "Max Tokens" only repeats the key


def json_schema(command: str) -> dict[str, Any]:
    """The JSON Schema of the file that a command reads."""
    schema = COMMANDS[command][0].model_json_schema(schema_generator=_TomlJsonSchema)
    return {
        "$schema": _TomlJsonSchema.schema_dialect,
        **schema,
        "title": f"{command}.toml of tutelage",
    }


def undescribed(command: str) -> list[str]:
    """Keys, such as ``optimizer.eps``, that neither a field nor a model describes."""
    schema = json_schema(command)
    defs = schema.get("$defs", {})
    return [
        f"{name}.{key}"
        for name, model in {"": schema, **defs}.items()
        for key, field in model.get("properties", {}).items()
        if not (field.get("description") or _referenced(field, defs).get("description"))
    ]


def _referenced(field: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = defs.get(field.get("$ref", "").rpartition("/")[2], {})
    return found
