"""Keys that a config may have: those of its sections and of chosen implementations."""

from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticCustomError

from distrain.fields import Choice


def list_keys(
    section: type[BaseModel],
    tree: dict[str, Any] | None = None,
) -> list[str]:
    """List the keys of a section, and the dotted keys below them.

    Of a choice, those are the keys of the implementation that the tree names, which may
    be a user's own class; of all registered ones without a tree or a valid name.
    """
    keys = list(section.model_fields)
    for name, info in section.model_fields.items():
        kind = info.annotation
        nested: list[type[BaseModel]] = []
        if isinstance(kind, type) and issubclass(kind, Choice):
            chosen = None if tree is None else find_choice(section, name, tree)
            nested = kind.list_classes() if chosen is None else [chosen[1]]
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            nested = [kind]
        for nested_class in nested:
            keys += [f"{name}.{key}" for key in list_keys(nested_class)]
    return list(dict.fromkeys(keys))


def find_choice(
    section: type[BaseModel],
    key: str,
    tree: dict[str, Any],
) -> tuple[str, type[Choice]] | None:
    """Return the name and class of the implementation that a tree names at a key.

    None: the key is not that of a choice, or the name is not valid.
    """
    info = section.model_fields.get(key)
    kind = info.annotation if info is not None else None
    if not isinstance(kind, type) or not issubclass(kind, Choice):
        return None
    values = tree.get(key, {})
    if not isinstance(values, dict):
        return None
    name = values.get("name", kind.default_name)
    try:
        return str(name), kind.find_class(name)
    # The name is a problem of its own, which validation reports.
    except PydanticCustomError:
        return None
