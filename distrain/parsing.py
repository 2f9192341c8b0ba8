"""Parse YAML and `key.sub=value` overrides into a validated section.

Every problem is reported, each in one sentence.
"""

import math
import shlex
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import ValidationError

from distrain.config_keys import find_choice, list_keys
from distrain.errors import UserError
from distrain.fields import CommandSection, Section
from distrain.suggestions import suggest_keys
from distrain.yaml12 import Yaml12Dumper, load_yaml

S = TypeVar("S", bound=Section)


class _OverrideDumper(Yaml12Dumper):
    """YAML dumper with double quotes only: an override has single ones around it."""

    def choose_scalar_style(self) -> str:
        """Choose the quotes of a text; none where it is plain."""
        style = super().choose_scalar_style()
        return '"' if style == "'" else style


# Wording of pydantic's errors of a type, by its name for them.
_TYPE_MESSAGES = {
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "string_type": "must be a text",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list",
    "dict_type": "must be a section of keys",
    "model_type": "must be a section of keys",
}


class OptionOverride(NamedTuple):
    """Override that a command-line option stands for."""

    option: str
    """The option as typed, such as `--workers 4`; messages name it."""
    text: str
    """The override, `key.sub=value`."""


class _AppliedOverride(NamedTuple):
    """Override that has been applied to a tree."""

    key: str
    label: str
    """Name in messages."""


def parse_mapping(text: str, origin: str) -> dict[str, Any]:
    """Parse YAML that holds a mapping of keys to values. Raises UserError."""
    tree = _parse_yaml(text, origin)
    if tree is None:
        raise UserError(f"{origin} is empty: it must hold a recipe")
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
    overrides: Sequence[str | OptionOverride] = (),
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
    check_overrides(overrides)
    _check_not_split(overrides)
    tree = deepcopy(tree)
    problems = []
    applied = []
    # Apply the overrides. One that cannot be applied is a problem like any other, so
    # that the validation below still runs and reports its own.
    for override in overrides:
        text = override if isinstance(override, str) else override.text
        problem = _apply_override(tree, text)
        if problem:
            problems.append(problem)
        else:
            applied.append(_label_override(override))
    # Validate the result.
    try:
        section = section_class.model_validate(tree)
    except ValidationError as error:
        problems += [
            _explain_problem(section_class, dict(details), tree, applied)
            for details in error.errors()
        ]
    # Report all problems together. Several keys that one override makes wrong give the
    # same sentence.
    problems = list(dict.fromkeys(problems))
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        lines = "".join(f"\n  - {line}" for line in problems)
        place = f"{origin} with its overrides" if overrides else origin
        raise UserError(f"{place} has {count}:{lines}")
    return section


def check_overrides(overrides: object) -> None:
    """Raise UserError if a caller's overrides are not a list of texts."""
    # A text is a sequence too, of characters.
    is_valid = (
        isinstance(overrides, Sequence)
        and not isinstance(overrides, str)
        and all(isinstance(item, str | OptionOverride) for item in overrides)
    )
    if not is_valid:
        raise UserError(
            f"overrides {_hide_url(repr(overrides))} must be a list of texts of the "
            'form key.sub=value: use, for example, ["epochs=10"]'
        )


def _check_not_split(overrides: Sequence[str | OptionOverride]) -> None:
    """Raise UserError if the shell split an override such as `key={a: 1, b: 2}`."""
    texts = [item if isinstance(item, str) else item.text for item in overrides]
    for start, text in enumerate(texts):
        closing = {"{": "}", "[": "]"}.get(text.partition("=")[2][:1])
        if closing is None or text.endswith(closing):
            continue
        for end in range(start + 1, len(texts)):
            # That is another override.
            if "=" in texts[end]:
                break
            if texts[end].endswith(closing):
                quoted = shlex.quote(" ".join(texts[start : end + 1]))
                raise UserError(
                    "the shell splits an override at its spaces: put it in quotes, "
                    f"{_hide_url(quoted)}"
                )


def _label_override(override: str | OptionOverride) -> _AppliedOverride:
    if isinstance(override, OptionOverride):
        return _AppliedOverride(override.text.partition("=")[0], override.option)
    key, _, value = override.partition("=")
    return _AppliedOverride(key, f"override {_hide_url(key)}={_hide_url(value)}")


def _hide_url(text: str) -> str:
    """Hide a text with a URL, which may hold a secret that messages must not show."""
    return "..." if "://" in text else text


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return load_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        # PyYAML's messages have several lines, and an excerpt of the text: a part of it
        # may hold a secret without looking like a URL.
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            mark = error.problem_mark
            problem = error.problem or ""
            # Some are the second half of a sentence.
            if problem.startswith("but ") and error.context:
                problem = f"{error.context}, {problem}"
            reason = f"line {mark.line + 1}, column {mark.column + 1}: {problem}"
        else:
            reason = " ".join(str(error).split())
        raise UserError(f"{origin} is not valid YAML: {_hide_url(reason)}") from None


def _apply_override(tree: dict[str, Any], text: str) -> str | None:
    """Apply one override to the tree in place; return the problem, if there is one."""
    key, equals, value = text.partition("=")
    shown = f"override {_hide_url(repr(text))}"
    if not equals or not key:
        return f"{shown} is not of the form key.sub=value"
    # Walk to the section that holds the key, creating sections on the way.
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            return f"{shown}: {_hide_url(parent)} is a value, not a section"
    # Values are YAML too, so that numbers, lists and null read as in a file.
    try:
        node[last] = _parse_yaml(value, shown)
    except UserError as error:
        return str(error)
    return None


def _explain_problem(
    section_class: type[Section],
    error: dict[str, Any],
    tree: dict[str, Any],
    overrides: Sequence[_AppliedOverride],
) -> str:
    """Explain one of pydantic's errors on a tree; name the override that caused it."""
    path = [str(key) for key in error["loc"]]
    if error["type"] in ("no_choice", "no_name"):
        path.append("name")
    key = ".".join(path)
    override = _find_override(path, error, overrides)
    if error["type"] == "extra_forbidden":
        problem = _format_unknown_key(section_class, path, tree, override, overrides)
    else:
        problem = _format_problem(section_class, key, error)
    if override is None:
        return problem
    # The override names the key already, unless the problem is another key's.
    if override.key == key or override.key.startswith(f"{key}."):
        problem = problem.removeprefix(f"{key}: ")
    return f"{override.label}: {problem}"


def _find_override(
    path: list[str],
    error: dict[str, Any],
    overrides: Sequence[_AppliedOverride],
) -> _AppliedOverride | None:
    """Find the last override that set what an error is about; None: the tree did."""
    key = ".".join(path)
    keys = [key]
    # A check across fields depends on others too, named as seen from its section.
    if error["type"] == "conflict":
        keys += [".".join([*path[:-1], field]) for field in error["ctx"]["fields"]]
    for override in reversed(overrides):
        # It set such a key, or a section around one.
        if any(f"{other}.".startswith(f"{override.key}.") for other in keys):
            return override
        # It set a key of an unknown section.
        is_unknown = error["type"] == "extra_forbidden"
        if is_unknown and override.key.startswith(f"{key}."):
            return override
    return None


def _format_problem(
    section_class: type[Section],
    key: str,
    error: dict[str, Any],
) -> str:
    """Format one of pydantic's errors at a known key as one line."""
    if error["type"] == "missing":
        info = section_class.model_fields.get(key)
        examples = info.examples if info is not None else None
        example = _format_section(key, examples[0]) if examples else f"{key}=..."
        return f"{key} is missing: set it in the recipe, or as {example}"
    if error["type"] == "no_name":
        return f"{key} {error['msg']}"
    # Messages of validators are complete sentences; pydantic only puts a prefix before.
    message = error["msg"].removeprefix("Value error, ")
    given = error["input"]
    value = repr(given)
    if error["type"] in ("no_choice", "no_section", "conflict", "value_error"):
        # They may hold the value, and that of a choice its name.
        for part in (value, error.get("ctx", {}).get("name", "")):
            message = message.replace(part, _hide_url(part))
        return f"{key}: {message}"
    message = message.replace("Input should be", "must be")
    message = _TYPE_MESSAGES.get(error["type"], message)
    # Name an example.
    if error["type"] == "model_type":
        keys = list_keys(section_class)
        below = [other for other in keys if other.startswith(f"{key}.")]
        message += f", such as {below[0]}" if below else ""
    elif error["type"] == "tuple_type" and isinstance(given, int | float | str):
        message += f", such as [{_hide_url(str(given))}]"
    return f"{key}: {message[0].lower()}{message[1:]}, not {_hide_url(value)}"


def _format_section(key: str, values: dict[str, Any]) -> str:
    """Format the override that sets a whole section, quoted for the shell."""
    text = yaml.dump(
        values,
        Dumper=_OverrideDumper,
        default_flow_style=True,
        sort_keys=False,
        width=math.inf,
    )
    return shlex.quote(f"{key}={text.strip()}")


def _format_unknown_key(
    section_class: type[Section],
    path: list[str],
    tree: dict[str, Any],
    override: _AppliedOverride | None,
    overrides: Sequence[_AppliedOverride],
) -> str:
    """Explain a key that does not exist, and suggest the key that may be meant."""
    key = ".".join(path)
    # Only overrides lead into a section with a dot.
    for part in path:
        section, _, field = part.rpartition(".")
        if section and key in list_keys(section_class):
            return (
                f"{key} is a key with a dot in its name, as overrides have: write "
                f"{field} below {section}"
            )
    # The key is that of an implementation other than the chosen one.
    if key in list_keys(section_class):
        choice = find_choice(section_class, path[0], tree)
        assert choice is not None
        name, chosen = choice
        names = [other for other in overrides if other.key == f"{path[0]}.name"]
        if override is not None or not names:
            return f"{key} is not a setting of {path[0]} {name}: remove it"
        # The recipe sets the key, and an override the name: only an override of the
        # whole section can leave it out, and with it all that the choice lacks.
        kept = {k: v for k, v in tree[path[0]].items() if k in chosen.model_fields}
        left_over = [f"{path[0]}.{k}" for k in tree[path[0]] if k not in kept]
        set_keys = [other.key for other in overrides]
        left_over = [other for other in left_over if other not in set_keys]
        verb = "are not settings" if len(left_over) > 1 else "is not a setting"
        typed = names[-1].label.removeprefix("override ")
        return (
            f"{', '.join(left_over)} {verb} of {path[0]} {name}: replace the "
            f"section, with {_format_section(path[0], kept)} instead of {typed}"
        )
    near = suggest_keys(key, list_keys(section_class, tree))
    key = _hide_url(key)
    is_used = path[0] in section_class.model_fields
    if not near and not is_used and issubclass(section_class, CommandSection):
        used = ", ".join(section_class.model_fields)
        return f"{section_class.command} does not use {key}, only {used}: remove it"
    if not near:
        return f"unknown key {key}: remove it (distrain schema lists all keys)"
    *others, last = near
    suggestion = f"{', '.join(others)} or {last}" if others else last
    return f"unknown key {key}; did you mean {suggestion}?"
