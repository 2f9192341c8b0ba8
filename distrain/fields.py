"""What all sections of a config are made of: fields that decide the weights, and fields that do not."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def result(default: Any = ..., **limits: Any) -> Any:
    """A field that decides the weights."""
    return Field(default, json_schema_extra={"decides": "result"}, **limits)


def operation(default: Any = ..., **limits: Any) -> Any:
    """A field that does not decide the weights."""
    return Field(default, json_schema_extra={"decides": "operation"}, **limits)


class Section(BaseModel):
    """A part of the tree: frozen, strict about types, no unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )
