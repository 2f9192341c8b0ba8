"""JSON Schema of a recipe, by which editors complete and check recipes."""

from typing import Any, cast

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, NoDefault
from pydantic_core import core_schema

from distrain.config import Config
from distrain.fields import Choice


def schema() -> dict[str, Any]:
    """Build the JSON Schema (draft 2020-12) of a recipe.

    It accepts what the parser accepts, with these differences: checks across fields
    (such as `virtual_workers` dividing `global_batch`) and of URLs are the parser's
    alone, JSON Schema takes 3.0 for an integer, and the keys of a loss, optimizer or
    schedule class of your own are not checked.
    """
    json_schema = Config.model_json_schema(schema_generator=_ConfigSchemaGenerator)
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        "title": "distrain recipe",
        **json_schema,
    }


class _ConfigSchemaGenerator(GenerateJsonSchema):
    """pydantic's generator, extended by choices: a schema for each implementation."""

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        """Generate the schema of a section, or of all implementations of a choice."""
        section = cast(type[BaseModel], schema["cls"])
        if Choice in section.__bases__:
            return self._make_choice_schema(cast(type[Choice], section))
        json_schema = super().model_schema(schema)
        del json_schema["title"]
        # Docstrings are wrapped, but editors would show their lines as paragraphs.
        for described in (json_schema, *json_schema["properties"].values()):
            described["description"] = _unwrap(described["description"])
        # `_make_choice_schema` decides whether the name may be left out.
        if issubclass(section, Choice):
            required = json_schema.pop("required")
            if required != ["name"]:
                json_schema["required"] = [key for key in required if key != "name"]
        return json_schema

    def _make_choice_schema(self, kind: type[Choice]) -> JsonSchemaValue:
        """Make the schema of a choice: `name` selects that of the other keys."""
        names: list[JsonSchemaValue] = []
        branches: list[JsonSchemaValue] = []
        # Registered implementations; the default one also where there is no name.
        for name, implementation in kind.registry.items():
            doc = _unwrap(implementation.__doc__ or "")
            names.append({"const": name, "description": doc})
            condition: JsonSchemaValue = {"properties": {"name": {"const": name}}}
            if name != kind.default_name:
                condition["required"] = ["name"]
            branches.append(self._make_branch(condition, implementation))
        # Import paths. ImportedModel stands for every network given by import path, so
        # its keys are known. The keys of a user's own loss, optimizer or schedule class
        # are not, and are not checked.
        import_path = {"type": "string", "pattern": ":"}
        names.append({**import_path, "description": kind.import_syntax})
        condition = {"properties": {"name": import_path}, "required": ["name"]}
        branches += [
            self._make_branch(condition, implementation)
            for implementation in kind.list_classes()
            if implementation not in kind.registry.values()
        ]
        # The name itself.
        name_schema: JsonSchemaValue = {
            "description": kind.model_fields["name"].description,
            "anyOf": names,
        }
        json_schema: JsonSchemaValue = {
            "type": "object",
            "properties": {"name": name_schema},
            "allOf": branches,
        }
        if kind.default_name is None:
            json_schema["required"] = ["name"]
        else:
            name_schema["default"] = kind.default_name
        return json_schema

    def _make_branch(
        self,
        condition: JsonSchemaValue,
        implementation: type[BaseModel],
    ) -> JsonSchemaValue:
        then = self.generate_inner(implementation.__pydantic_core_schema__)
        return {"if": condition, "then": then}

    def get_default_value(self, schema: core_schema.WithDefaultSchema) -> Any:
        """Return the default of a field; sections have none beside their fields'."""
        default = super().get_default_value(schema)
        return NoDefault if isinstance(default, BaseModel) else default

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Leave out the titles that pydantic makes of field names."""
        return False


def _unwrap(text: str) -> str:
    return " ".join(text.split())
