"""From YAML and `key.sub=value` overrides to a section of checked fields, every problem one sentence."""

import difflib
import re
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from distrain.errors import UserError
from distrain.fields import Choice, Section

S = TypeVar("S", bound=Section)


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2 numbers: PyYAML reads 1e-3 as a string."""


_YamlLoader.yaml_implicit_resolvers = {
    k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$"),
    list("-+.0123456789"),
)


def parse_mapping(text: str, origin: str) -> dict[str, Any]:
    """Read a YAML mapping of keys to values. Raises UserError."""
    tree = _parse_yaml(text, origin)
    if not isinstance(tree, dict):
        raise UserError(
            f"{origin} must hold a mapping of keys, not {type(tree).__name__}"
        )
    return tree


def parse_section(
    section_class: type[S],
    tree: dict[str, Any],
    origin: str,
    overrides: Sequence[str] = (),
) -> S:
    """Apply `key.sub=value` overrides to a tree of plain values, and validate it.

    Args:
        form: the section that it is to become.
        tree: values by key, sections as trees of their own; left as it is.
        origin: what messages call it.
        overrides: changes to the tree, in their order.

    Raises:
        UserError: naming every problem at once.
    """
    tree = deepcopy(tree)
    found = [problem for text in overrides if (problem := _apply_override(tree, text))]
    try:
        section = section_class.model_validate(tree)
    except ValidationError as error:
        found += [_format_problem(section_class, dict(e), tree) for e in error.errors()]
    if found:
        lines = "".join(f"\n  - {line}" for line in found)
        raise UserError(
            f"{origin} has {len(found)} problem{'s' * (len(found) > 1)}:{lines}"
        )
    return section


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return _YamlLoader(text).get_single_data()
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(
            f"{origin} is not YAML: {' '.join(str(error).split())}"
        ) from None


def _apply_override(tree: dict[str, Any], text: str) -> str | None:
    """Apply one override to the tree; the problem, if there is one."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        return f"override {text!r} is not of the form key.sub=value"
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            return f"override {text!r}: {parent} is a value, not a section"
    try:
        node[last] = _parse_yaml(value, f"override {text!r}")
    except UserError as error:
        return str(error)
    return None


def _format_problem(
    section_class: type[Section], error: dict[str, Any], tree: dict[str, Any]
) -> str:
    """One problem of pydantic's with a tree, as one line."""
    path = [str(part) for part in error["loc"]]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        known = _list_keys(section_class)
        if key in known:
            kind = section_class.model_fields[path[0]].annotation
            assert isinstance(kind, type)
            assert issubclass(kind, Choice)
            return f"{path[0]} {tree[path[0]].get('name', kind.default_name)} does not use {key}: remove it"
        known = _list_choice_keys(section_class, path[0], tree) + known
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        near = near or [k for k in known if k.split(".")[-1] == path[-1]][:1]
        return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else "")
    if error["type"] == "no_choice":
        return f"{key}.name: {error['msg']}"
    if error["type"] == "no_section":
        return f"{key}: {error['msg']}"
    if error["type"] == "missing":
        return f"{key} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{key}: {message}"
    return f"{key}: {message[0].lower()}{message[1:]}, not {error['input']!r}"


def _list_choice_keys(
    section_class: type[Section], section: str, tree: dict[str, Any]
) -> list[str]:
    """All dotted keys of the form that a tree names in a section, known or not; none if it is no choice."""
    info = section_class.model_fields.get(section)
    if (
        info is None
        or not isinstance(info.annotation, type)
        or not issubclass(info.annotation, Choice)
    ):
        return []
    chosen = info.annotation.find_class(
        tree[section].get("name", info.annotation.default_name)
    )
    return [f"{section}.{key}" for key in _list_keys(chosen)]


def _list_keys(section: type[BaseModel]) -> list[str]:
    """All dotted keys below a section, those of every form of a choice included."""
    keys = []
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Choice):
            members: list[type[BaseModel]] = kind.list_classes()
        else:
            members = (
                [kind] if isinstance(kind, type) and issubclass(kind, BaseModel) else []
            )
        below = [f"{name}.{key}" for member in members for key in _list_keys(member)]
        keys += below or [name]
    return keys
