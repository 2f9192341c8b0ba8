import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.data.prepare.class_numbers import (
    find_lookalikes,
    note_lookalikes,
    number_classes,
)


def test_text_is_sorted_and_numbers_are_their_own():
    assert number_classes(["b", "a", "10", "9"], "x")[:2] == (
        ("10", "9", "a", "b"),
        {"10": 0, "9": 1, "a": 2, "b": 3},
    )
    assert number_classes([2, -1, 0, 1], "x") == (
        ("0", "1", "2"),
        {0: 0, 1: 1, 2: 2},
        [],
    )


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ([1, 2], "label 0 has no image in x, .*: are labels counted from 1.$"),
        ([0, 3], "2 of the labels 0 to 3, such as 1, have no image in x, and are cl"),
        ([5], "5 of the labels 0 to 5, such as 0, have no image in x"),
        (["cat", "cat "], "'cat' and 'cat ' look the same and are different classes"),
    ],
)
def test_what_may_be_a_mistake_is_noted(values, note):
    (found,) = number_classes(values, "x").notes
    assert re.search(note, found)


def test_names_that_look_the_same_are_found():
    composed, decomposed = "café", unicodedata.normalize("NFD", "café")
    names = ["dog", "Cat", composed, "cat ", "a b", decomposed, "cat", "a  b", "bird"]
    assert sorted(find_lookalikes(names)) == sorted(
        [["Cat", "cat", "cat "], [decomposed, composed], ["a  b", "a b"]]
    )
    (note,) = note_lookalikes([composed, decomposed])
    assert note.startswith(r"'cafe\u0301' and 'caf\xe9' look the same")
    assert note_lookalikes(["cat", "dog"]) == []
    (note,) = note_lookalikes(["a", "A", "b", "B"])
    assert note.startswith("'A' and 'a' (and 1 more) look the same")


@given(st.sets(st.text(max_size=4), max_size=8))
def test_lookalikes_are_groups_of_the_names(names):
    groups = find_lookalikes(names)
    flat = [name for group in groups for name in group]
    assert set(flat) <= names
    assert len(flat) == len(set(flat))
    assert all(len(group) > 1 for group in groups)
