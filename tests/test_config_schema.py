"""The JSON Schema of recipes accepts what the parser accepts, and nothing else."""

import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from distrain.config import Config, parse_config, parse_config_yaml
from distrain.config_schema import schema
from distrain.errors import UserError
from distrain.fields import Choice
from distrain.models.model import ImportedModel
from distrain.parsing import parse_mapping

ROOT = Path(__file__).parents[1]
RECIPES = {p.name: p.read_text() for p in sorted((ROOT / "configs").glob("*.yaml"))} | {
    f"{path}-{i}": text
    for path in ("README.md", "configs/README.md", "cluster/README.md")
    for i, text in enumerate(
        re.findall(r"^```yaml\n(.*?)^```$", (ROOT / path).read_text(), re.M | re.S)
    )
}
SCHEMA = schema()
VALIDATOR = Draft202012Validator(SCHEMA)
LEAST: dict[str, Any] = {
    "data": {"train": "x", "val": "y"},
    "schedule": {"name": "constant", "lr": 0.1},
}
# Keys without which an implementation is not valid.
NEEDED = {"step": {"lr": 0.1, "drop_epochs": [1]}}
NEEDED |= {
    name: {"lr": 0.1}
    for name in ("constant", "plateau", "polynomial", "cosine", "geometric")
}
# Checks of one value against others, which no schema can express.
ACROSS_FIELDS = re.compile(
    "does not divide global_batch|needs augment.crop|is less than augment.crop"
    "|belongs to form|nesterov needs|has no nesterov|follows the validation|exact mode needs threads"
    "|minimum above its maximum|more than virtual_workers"
)
VALUES = [
    None, True, False, -1, 0, 1, 2, 16, 60, 61, 65535, 65536, 1 << 32, -0.5, 0.5, 0.99, 1.5,
    "", "x", "auto", "1", "8 GiB", "0.5kb", "0 GiB", "0", "GiB", "8 GXB", "8KIBIT", "8 k", "8 ib", "-8",
    "10%", "1,5GiB", "1.5.2GB", "2GiB/rank", "2Gbit", "2gigs", "1e9", "64Gi", "1.5 tB",
    [], [1], [2, 3], [3, 2], [0, 1], [1, 2, 3], [1, "x"], ["auto"], [True, 1], [1.5, 2], {}, {"a": 1},
]  # fmt: skip


def agree(tree: dict[str, Any]) -> None:
    try:
        parse_config(tree, "test")
    except UserError as error:
        problem = str(error)
    else:
        problem = ""
    found = [f"{e.json_path}: {e.message}" for e in VALIDATOR.iter_errors(tree)]
    if not found and ACROSS_FIELDS.search(problem):
        return
    assert bool(found) == bool(problem), (tree, found, problem)


def list_sections() -> Iterator[tuple[str, str | None, type[BaseModel]]]:
    """Each section of a recipe, by its key, and the name of its implementation."""
    yield "", None, Config
    for key, info in Config.model_fields.items():
        kind = info.annotation
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            continue
        if not issubclass(kind, Choice):
            yield key, None, kind
            continue
        for implementation in kind.list_classes():
            assert issubclass(implementation, Choice)
            is_imported = implementation is ImportedModel
            name = "torchvision:alexnet" if is_imported else implementation.config_name
            yield key, name, implementation


SECTIONS = list(list_sections())


def make_tree(section: str, name: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """A valid tree, and its section."""
    tree = deepcopy(LEAST)
    if not section:
        return tree, tree
    if name is not None:
        tree[section] = {"name": name, **NEEDED.get(name, {})}
    return tree, tree.setdefault(section, {})


def test_the_schema_is_one_of_draft_2020_12():
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid(name):
    tree = parse_mapping(RECIPES[name], name)
    assert [e.message for e in VALIDATOR.iter_errors(tree)] == []


def test_a_resolved_config_is_valid():
    """Every field at its default, as --dry-run prints it."""
    for text in RECIPES.values():
        config = parse_config_yaml(text, "test")
        assert VALIDATOR.is_valid(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))))  # fmt: skip


@pytest.mark.parametrize(
    ("section", "name", "kind"), SECTIONS, ids=[f"{s}-{n}" for s, n, _ in SECTIONS]
)
def test_schema_and_parser_agree_on_every_field(section, name, kind):
    """Each field is given values of all types, in and out of range, and left out."""
    tree, values = make_tree(section, name)
    assert VALIDATOR.is_valid(tree)
    agree(tree)
    for key, info in kind.model_fields.items():
        if section == "" and isinstance(info.annotation, type) and issubclass(info.annotation, Choice):  # fmt: skip
            tried = [v for v in VALUES if v != {} or key == "schedule"]
        else:
            tried = VALUES
        before = values.pop(key, None)
        agree(tree)
        literals = re.findall(r"'(\w+)'", str(info.annotation))
        for value in [*tried, *literals]:
            values[key] = value
            agree(tree)
        values.pop(key)
        if before is not None:
            values[key] = before
    # No key of another section or implementation, and none at all that is unknown.
    for key in ("unknown", "momentum", "beta1", "lrn", "options", "factor", "every"):
        if key not in kind.model_fields:
            values[key] = 0.5
            agree(tree)
            assert not VALIDATOR.is_valid(tree), key
            del values[key]


@pytest.mark.parametrize(
    ("tree", "is_valid"),
    [
        ({"schedule": {"name": "constant"}}, False),
        ({"schedule": {"lr": 0.1}}, False),
        ({"schedule": {"name": "step", "lr": 0.1}}, False),
        ({"schedule": {"name": "constant", "lr": 1}}, True),
        ({"optimizer": {"momentum": 0.5}}, True),
        ({"optimizer": {"beta1": 0.5}}, False),
        ({"optimizer": {"name": "adam", "momentum": 0.5}}, False),
        ({"optimizer": {"name": "adma"}}, False),
        ({"optimizer": {"name": ["adam"]}}, False),
        ({"model": {"name": "torchvision:resnet50", "options": {"a": [1]}}}, True),
        ({"model": {"name": "torchvision:resnet50", "width": 0.5}}, False),
        ({"model": {"name": "a:b:c"}}, False),
        ({"epochs": "90"}, False),
    ],
)
def test_choices(tree, is_valid):
    agree({**LEAST, **tree})
    assert VALIDATOR.is_valid({**LEAST, **tree}) is is_valid


def test_classes_of_ones_own_have_any_keys(tmp_path, monkeypatch):
    (tmp_path / "own_loss.py").write_text(
        "from distrain.losses import CrossEntropy\n\n\nclass Own(CrossEntropy):\n    gamma: float = 2.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    tree = {**LEAST, "loss": {"name": "own_loss:Own", "gamma": 1}}
    parse_config(tree, "test")
    assert VALIDATOR.is_valid(tree)


def test_every_field_is_described_with_its_default():
    for section, _, kind in SECTIONS:
        json_schema = SCHEMA if section == "" else SCHEMA["$defs"][kind.__name__]
        properties = json_schema["properties"]
        assert list(properties) == list(kind.model_fields)
        for key, info in kind.model_fields.items():
            shown = properties[key]
            assert shown["description"] == " ".join((info.description or "").split())
            is_section = isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)  # fmt: skip
            if not info.is_required() and not is_section and key != "name":
                assert shown["default"] == to_jsonable_python(info.default)
    assert SCHEMA["properties"]["precision"]["enum"] == ["fp32", "tf32", "bf16"]
    assert SCHEMA["$defs"]["UpdateRule"]["properties"]["name"]["default"] == "sgd"
