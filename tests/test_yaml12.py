"""Recipes are YAML 1.2, and what is dumped is read back as it was, by readers of YAML 1.1 too."""

import datetime
import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain.config import parse_config, parse_config_yaml, to_yaml
from distrain.errors import UserError
from distrain.yaml12 import dump_yaml, load_yaml

LEAST = {"data": {"train": "x"}, "schedule": {"name": "constant", "lr": 1}}

NUMBERS = {
    "010": 10, "08": 8, "-07": -7, "+1": 1, "0o17": 15, "0x1F": 31, ".5": 0.5, "5.": 5.0, "-.5e-1": -0.05,
    "1e3": 1000.0, "1E-3": 0.001, ".inf": math.inf, "-.INF": -math.inf,
}  # fmt: skip
OTHERS = {"~": None, "": None, "Null": None, "TRUE": True, "False": False}
TEXTS = (
    "1:30", "190:20:30", "1:30.5", "1_000", "1_0.5", "0b1", "0x_1", "-0x1", "0o8", "yes", "No", "on", "OFF", "y", "n",
    "2020-01-01", "2020-01-01T10:00:00Z", "=", "inf", "nan", "-.nan", ".", "1e", "nULL", "1,000",
)  # fmt: skip


@pytest.mark.parametrize(("text", "value"), {**NUMBERS, **OTHERS}.items())
def test_a_plain_scalar_is_what_yaml_1_2_says(text, value):
    found = load_yaml(f"a: {text}")["a"]
    assert (type(found), found) == (type(value), value)


def test_not_a_number():
    assert math.isnan(load_yaml(".NaN"))


@pytest.mark.parametrize("text", TEXTS)
def test_all_else_is_a_text(text):
    assert load_yaml(f"{{a: {text!r}}}") == {"a": text}
    assert load_yaml(f"a: {text}") == {"a": text}


@pytest.mark.parametrize("text", ["1:30", "1_000", "2020-01-01", "0b1"])
def test_an_integer_that_is_none_is_named_as_written(text):
    tree = f"epochs: {text}\ndata: {{train: x}}\nschedule: {{name: constant, lr: 1}}\n"
    with pytest.raises(UserError, match=f"epochs: must be an integer, not '{text}'"):
        parse_config_yaml(tree, "test")
    with pytest.raises(UserError, match=f"must be an integer, not '{text}'"):
        parse_config(LEAST, "test", [f"epochs={text}"])


def test_an_override_is_read_as_the_file_is():
    assert parse_config(LEAST, "test", ["epochs=010"]).epochs == 10
    assert parse_config(LEAST, "test", ["run=2020-01-01"]).run == "2020-01-01"
    with pytest.raises(UserError, match="must be true or false, not 'yes'"):
        parse_config(LEAST, "test", ["augment.mirror=yes"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: !!int 1:30", "'1:30' is tagged as an integer, but is not"),
        ("a: !!int ''", "'' is tagged as an integer, but is not"),
        ("a: !!float x", "'x' is tagged as a number, but is not"),
        ("a: !!bool yes", "'yes' is tagged as true or false, but is not"),
        ("a: !!null x", "'x' is tagged as null, but is not"),
        ("a: !!timestamp 2020-01-01", "could not determine a constructor for the tag 'tag:yaml.org,2002:timestamp'"),
        ("a: *b", "found undefined alias 'b'"),
    ],
)  # fmt: skip
def test_a_tag_that_does_not_fit_is_a_sentence(text, problem):
    with pytest.raises(UserError) as refused:
        parse_config_yaml(text, "a.yaml")
    assert (
        str(refused.value) == f"a.yaml is not valid YAML: line 1, column 4: {problem}"
    )


def test_what_is_nested_too_deeply_is_a_sentence():
    with pytest.raises(UserError, match=r"is not valid YAML: it is nested too deeply"):
        parse_config_yaml("[" * 5000, "a.yaml")


@pytest.mark.parametrize(
    ("first", "second"),
    [("a", "'a'"), ("a", '"a"'), ("1", "0x1"), ("1", "1.0"), ("~", "null"), ("true", "True"), ("<<", "<<")],
)  # fmt: skip
def test_one_key_in_two_spellings_is_set_twice(first, second):
    for text in (f"x:\n- {first}: {{}}\n  {second}: {{}}\n", f"? {first}\n: {{}}\n? {second}\n: {{}}\n"):  # fmt: skip
        with pytest.raises(yaml.YAMLError, match="is set twice"):
            load_yaml(text)


def test_a_text_that_looks_like_a_number_comes_back():
    config = parse_config(LEAST, "test", ["data.train='1e3'", "data.val='0o17'"])
    again = parse_config_yaml(to_yaml(config), "test")
    assert (again.data.train, again.data.val) == ("1e3", "0o17")


SCALARS = st.one_of(
    st.text(max_size=6),
    st.text("0123456789.:_-+eExobnyYOFf~<=", max_size=6),
    st.sampled_from([*NUMBERS, *OTHERS, *TEXTS]),
    st.integers(),
    st.floats(allow_nan=False),
    st.booleans(),
    st.none(),
)


@given(st.dictionaries(st.text(min_size=1, max_size=4), SCALARS, max_size=3))
@settings(max_examples=100)
def test_what_is_dumped_is_read_back(tree):
    text = dump_yaml(tree)
    found = load_yaml(text)
    assert found == tree
    assert [*map(type, found.values())] == [*map(type, tree.values())]
    # Other tools read YAML 1.1: to them a text is a text, too.
    old = yaml.safe_load(text)
    texts = {key: value for key, value in tree.items() if isinstance(value, str)}
    assert {key: old[key] for key in texts} == texts
    assert datetime.date not in map(type, old.values())
