"""Prefixes of parameter names end at dots, and one that no name has is answered by what there is."""

import pytest

from distrain.errors import UserError
from distrain.parameter_names import check_prefixes, find_longest_prefix, has_prefix

NAMES = ["features.0.weight", "features.0.bias", "features.10.weight", "fc.weight"]


@pytest.mark.parametrize(
    ("prefix", "count"),
    [
        ("features", 3),
        ("features.0", 2),
        ("features.1", 0),
        ("features.10.weight", 1),
        ("feat", 0),
        ("features.", 0),
        ("f", 0),
    ],
)
def test_a_prefix_ends_at_a_dot(prefix, count):
    assert sum(has_prefix(name, prefix) for name in NAMES) == count


def test_the_longest_wins():
    prefixes = ["features", "features.0", "features.0.bias", "fc"]
    found = [find_longest_prefix(name, prefixes) for name in NAMES]
    assert found == ["features.0", "features.0.bias", "features", "fc"]
    assert find_longest_prefix("head", prefixes) is None


@pytest.mark.parametrize(
    ("prefix", "shown"),
    [
        ("feat", "features, fc"),
        ("features.1", "features.0, features.10"),
        ("features.0.scale.x", "features.0.weight, features.0.bias"),
        ("", "features, fc"),
    ],
)
def test_what_there_is_is_listed(prefix, shown):
    with pytest.raises(UserError) as caught:
        check_prefixes("model.freeze", ["fc", prefix], NAMES)
    assert str(caught.value) == (
        f"model.freeze has {prefix}, which no parameter's name begins with: use one of "
        f"{shown}, or of what is below"
    )


def test_a_long_list_is_cut():
    names = [f"block{i}.weight" for i in range(50)]
    with pytest.raises(UserError, match=r"block19, \.\.\., or"):
        check_prefixes("model.freeze", ["head"], names)
