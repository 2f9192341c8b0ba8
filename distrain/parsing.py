"""Parse YAML and `key.sub=value` overrides into a validated section.

Every problem is reported, each in one sentence.
"""

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
    """YAML loader with the numbers of YAML 1.2: PyYAML reads 1e-3 as a string."""


# A copy: add_implicit_resolver would change the lists that SafeLoader uses itself.
_YamlLoader.yaml_implicit_resolvers = {
    character: list(resolvers)
    for character, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$"),
    list("-+.0123456789"),
)


def parse_mapping(text: str, origin: str) -> dict[str, Any]:
    """Parse YAML that holds a mapping of keys to values. Raises UserError."""
    tree = _parse_yaml(text, origin)
    if not isinstance(tree, dict):
        raise UserError(
            f"{origin} must hold lines of the form `key: value`, not a single "
            f"{type(tree).__name__}"
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
        section_class: class of the section to build.
        tree: values by key, with nested sections as nested trees; it is not modified.
        origin: name of the tree in messages, such as the path of its file.
        overrides: changes to the tree, applied in this order.

    Raises:
        UserError: naming every problem at once.
    """
    tree = deepcopy(tree)
    problems = []
    # Apply the overrides. One that cannot be applied is a problem like any other, so
    # that the validation below still runs and reports its own.
    for text in overrides:
        problem = _apply_override(tree, text)
        if problem:
            problems.append(problem)
    # Validate the result.
    try:
        section = section_class.model_validate(tree)
    except ValidationError as error:
        problems += [
            _format_problem(section_class, dict(details), tree)
            for details in error.errors()
        ]
    # Report all problems together.
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        lines = "".join(f"\n  - {line}" for line in problems)
        raise UserError(f"{origin} has {count}:{lines}")
    return section


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return _YamlLoader(text).get_single_data()
    except (yaml.YAMLError, ValueError) as error:
        # PyYAML's messages have several lines.
        reason = " ".join(str(error).split())
        raise UserError(f"{origin} is not valid YAML: {reason}") from None


def _apply_override(tree: dict[str, Any], text: str) -> str | None:
    """Apply one override to the tree in place; return the problem, if there is one."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        return f"override {text!r} is not of the form key.sub=value"
    # Walk to the section that holds the key, creating sections on the way.
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            return f"override {text!r}: {parent} is a value, not a section"
    # Values are YAML too, so that numbers, lists and null read as in a file.
    try:
        node[last] = _parse_yaml(value, f"override {text!r}")
    except UserError as error:
        return str(error)
    return None


def _format_problem(
    section_class: type[Section],
    error: dict[str, Any],
    tree: dict[str, Any],
) -> str:
    """Format one of pydantic's errors on a tree as one line."""
    path = [str(key) for key in error["loc"]]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        return _format_unknown_key(section_class, path, tree)
    if error["type"] == "no_choice":
        return f"{key}.name: {error['msg']}"
    if error["type"] == "no_section":
        return f"{key}: {error['msg']}"
    if error["type"] == "missing":
        return f"{key} is missing: set it in the recipe, or as {key}=..."
    # Messages of validators are complete sentences; pydantic only puts a prefix before.
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{key}: {message}"
    return f"{key}: {message[0].lower()}{message[1:]}, not {error['input']!r}"


def _format_unknown_key(
    section_class: type[Section],
    path: list[str],
    tree: dict[str, Any],
) -> str:
    """Explain a key that does not exist, and suggest the key that may be meant."""
    key = ".".join(path)
    known = _list_keys(section_class)
    # The key is known, so it belongs to an implementation other than the chosen one.
    if key in known:
        kind = section_class.model_fields[path[0]].annotation
        assert isinstance(kind, type)
        assert issubclass(kind, Choice)
        name = tree[path[0]].get("name", kind.default_name)
        return f"{key} is not a setting of {path[0]} {name}: remove it"
    # Suggest a similar key, or else one of the same name in any section. Keys of the
    # chosen implementation come first, since a user's own class is not in `known`.
    known = _list_choice_keys(section_class, path[0], tree) + known
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:
        near = [other for other in known if other.split(".")[-1] == path[-1]]
    if not near:
        return f"unknown key {key}: remove it (--dry-run shows all keys)"
    return f"unknown key {key}; did you mean {near[0]}?"


def _list_choice_keys(
    section_class: type[Section],
    section: str,
    tree: dict[str, Any],
) -> list[str]:
    """List the dotted keys of the implementation that a tree names in a section.

    The implementation may be a user's own class. Any other section has none.
    """
    info = section_class.model_fields.get(section)
    kind = info.annotation if info is not None else None
    if not isinstance(kind, type) or not issubclass(kind, Choice):
        return []
    chosen = kind.find_class(tree[section].get("name", kind.default_name))
    return [f"{section}.{key}" for key in _list_keys(chosen)]


def _list_keys(section: type[BaseModel]) -> list[str]:
    """List all dotted keys below a section, for all registered choices."""
    keys: list[str] = []
    for name, info in section.model_fields.items():
        kind = info.annotation
        nested: list[type[BaseModel]] = []
        if isinstance(kind, type) and issubclass(kind, Choice):
            nested = kind.list_classes()
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            nested = [kind]
        nested_keys: list[str] = []
        for nested_class in nested:
            nested_keys += [f"{name}.{key}" for key in _list_keys(nested_class)]
        # A plain value is a key itself.
        keys += nested_keys or [name]
    return keys
