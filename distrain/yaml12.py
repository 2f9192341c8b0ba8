"""YAML 1.2 on top of PyYAML, which reads and writes YAML 1.1: `load_yaml`, `dump_yaml`.

Plain scalars are those of the core schema of YAML 1.2.2, section 10.3.2. So 010 is 10,
and 1:30, 1_000, yes and 2020-01-01 are texts. The merge key `<<` is YAML 1.1's.
"""

import re
from typing import Any, ClassVar

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

_TAG = "tag:yaml.org,2002:"
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
# The first pattern that matches a plain scalar as a whole decides its type.
_PATTERNS = {
    "null": _NULL,
    "bool": _BOOL,
    "int": _INT,
    "float": _FLOAT,
    "merge": re.compile("<<"),
}


class _Loader(yaml.SafeLoader):
    """YAML 1.2 loader in which a key that is set twice is an error.

    PyYAML takes the last one.
    """

    # Those of PyYAML's that belong to the core schema; more are added below.
    yaml_constructors: ClassVar[dict[Any, Any]] = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag in (_TAG + "str", _TAG + "seq", _TAG + "map")
    }

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        """Return the tag of a node that has none of its own."""
        if kind is yaml.ScalarNode:
            is_plain = implicit[0]
            return _resolve_plain(value) if is_plain else _TAG + "str"
        return _TAG + ("seq" if kind is yaml.SequenceNode else "map")

    # Before the keys that `<<` merges are added, which may be set again.
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping. Raises ComposerError if a key is set twice."""
        mapping = super().compose_mapping_node(anchor)
        first_marks: dict[Any, yaml.Mark] = {}
        for key, _ in mapping.value:
            # A mapping or a list as a key is refused when the mapping is constructed.
            if not isinstance(key, yaml.ScalarNode):
                continue
            is_merge = key.tag == _TAG + "merge"
            value = key.value if is_merge else self.construct_object(key)
            if value in first_marks:
                first_line = first_marks[value].line + 1
                problem = f"{key.value} is set twice (first in line {first_line})"
                raise ComposerError(None, None, problem, key.start_mark)
            first_marks[value] = key.start_mark
        return mapping


def _resolve_plain(text: str) -> str:
    """Return the tag of a plain scalar."""
    for name, pattern in _PATTERNS.items():
        if pattern.fullmatch(text):
            return _TAG + name
    return _TAG + "str"


def _construct_null(loader: _Loader, node: yaml.ScalarNode) -> None:
    _read_scalar(loader, node, _NULL, "null")


def _construct_bool(loader: _Loader, node: yaml.ScalarNode) -> bool:
    return _read_scalar(loader, node, _BOOL, "true or false").lower() == "true"


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = _read_scalar(loader, node, _INT, "an integer")
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text, base)


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = _read_scalar(loader, node, _FLOAT, "a number")
    # Python writes infinity and NaN without the dot.
    is_finite = text[-1].isdigit() or text[-1] == "."
    return float(text if is_finite else text.replace(".", ""))


def _read_scalar(
    loader: _Loader, node: yaml.ScalarNode, pattern: re.Pattern[str], kind: str
) -> str:
    """Return a scalar's text. Raises ConstructorError if an explicit tag does not fit.

    An example is `!!int 1:30`.
    """
    text = str(loader.construct_scalar(node))
    if not pattern.fullmatch(text):
        raise ConstructorError(
            None, None, f"{text!r} is tagged as {kind}, but is not", node.start_mark
        )
    return text


_Loader.add_constructor(_TAG + "null", _construct_null)
_Loader.add_constructor(_TAG + "bool", _construct_bool)
_Loader.add_constructor(_TAG + "int", _construct_int)
_Loader.add_constructor(_TAG + "float", _construct_float)


class Yaml12Dumper(yaml.SafeDumper):
    """YAML dumper whose texts are texts for readers of YAML 1.1 and of 1.2.

    PyYAML quotes what 1.1 would read as another type, but not the 0o17 and 1e3 of 1.2.
    """


for _name in ("int", "float"):
    Yaml12Dumper.add_implicit_resolver(
        _TAG + _name,
        re.compile(rf"({_PATTERNS[_name].pattern})\Z"),
        list("-+.0123456789"),
    )


def load_yaml(text: str) -> Any:
    """Load a YAML 1.2 document.

    Raises:
        YAMLError: it is not valid, or sets a key twice.
        ValueError: a number has too many digits.
    """
    try:
        return _Loader(text).get_single_data()
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def dump_yaml(tree: Any) -> str:
    """Dump plain values, keys in their order; `load_yaml` reads equal ones from it."""
    return yaml.dump(tree, Dumper=Yaml12Dumper, sort_keys=False)
