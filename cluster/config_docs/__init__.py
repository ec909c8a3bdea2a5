"""The configuration reference and the editors' JSON Schemas, generated from the models' fields."""
