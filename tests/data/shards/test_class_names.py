import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.data.shards.class_names import describe_difference, match_classes
from distrain.errors import UserError

TRAIN = ("ant", "bee", "café", "dog")


def match(classes, reference=TRAIN):
    return match_classes(classes, "shards/val", reference, "shards/train")


@pytest.mark.parametrize(
    ("classes", "numbers"),
    [
        (TRAIN, [0, 1, 2, 3]),
        (("dog", "ant"), [3, 0]),
        (TRAIN[::-1], [3, 2, 1, 0]),
        (("bee",), [1]),
    ],
)
def test_classes_are_matched_by_name(classes, numbers):
    assert match(classes) == numbers


@given(st.lists(st.text(), unique=True, min_size=1), st.data())
def test_any_part_in_any_order_is_matched(reference, data):
    classes = data.draw(st.lists(st.sampled_from(reference), unique=True, min_size=1))
    numbers = match(classes, reference)
    assert [reference[number] for number in numbers] == classes


@pytest.mark.parametrize(
    ("name", "difference"),
    [
        ("cow", None),
        ("Dog", "upper and lower case"),
        ("dog ", "spaces"),
        (unicodedata.normalize("NFD", "café"), "Unicode form, NFC and NFD"),
        ("DOG ", "case, spaces or Unicode form"),
    ],
)
def test_the_first_class_that_differs_is_named(name, difference):
    with pytest.raises(UserError) as error:
        match(("ant", name, "eel"))
    text = str(error.value)
    assert text.startswith(f"class 1 of shards/val, {name!r}, is not one of the 4 ")
    assert "shards/train" in text
    assert "\n" not in text
    if difference is None:
        assert "they differ" not in text
    else:
        assert f"(they differ in {difference})" in text or (
            f"(they differ in their {difference})" in text
        )


def test_two_names_that_look_the_same_are_shown_apart():
    with pytest.raises(UserError, match=r"which has 'caf\\xe9', not 'cafe\\u0301'"):
        match((unicodedata.normalize("NFD", "café"),))


def test_numbers_for_names_get_the_option_that_joins_them():
    with pytest.raises(UserError, match="pack it with --classes-of shards/train"):
        match(("0", "1"))


def test_a_name_that_stands_twice_is_matched_only_as_a_whole():
    cranes = ("crane", "ant", "crane")
    assert match(cranes, cranes) == [0, 1, 2]
    for classes, reference, place in (
        (("crane", "crane"), TRAIN, "val"),
        (("ant",), cranes, "train"),
    ):
        with pytest.raises(
            UserError, match=f"^shards/{place} has 2 classes called 'crane'"
        ):
            match(classes, reference)


def test_names_that_are_the_same_do_not_differ():
    assert describe_difference("dog", "cat") is None
    assert describe_difference("a b", "a-b") is None
