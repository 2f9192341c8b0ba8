"""Classes of labels that a source holds as values: numbers, text or booleans."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

from distrain.errors import UserError

LabelValue: TypeAlias = int | str | bool
"""Label as a source stores it."""
_MAX_CLASSES = 1 << 20
_CONVERT = "labels are numbers from 0, one per class, or names"


class ClassNumbers(NamedTuple):
    """Classes of a source, and the number of each label value."""

    classes: tuple[str, ...]
    """Class names, by number."""
    number_by_value: Mapping[LabelValue, int]
    """Number of each value that is a label; other values are none."""
    notes: list[str]
    """What the user should know: one sentence each."""


def number_classes(values: Iterable[LabelValue], location: str) -> ClassNumbers:
    """Give each label value of a source the number of its class.

    Numbers from 0 are their own, and classes "0", "1", ...; negative numbers stand for
    a missing label. Text and booleans are class names, numbered in the order of their
    names.

    Args:
        values: all label values of a source, without None.
        location: the source, for messages.

    Raises:
        UserError: there is no label, a number is too large, or text and numbers are
            mixed.
    """
    # bool is a subclass of int, and True == 1.
    numbers: set[int] = set()
    names: dict[str, LabelValue] = {}
    for value in values:
        if isinstance(value, (bool, str)):
            names[str(value)] = value
        else:
            numbers.add(value)
    if names and numbers:
        raise UserError(
            f"{location} has labels of several types, such as {min(numbers)} and "
            f"{min(names)!r}: {_CONVERT}"
        )
    if names:
        classes = tuple(sorted(names))
        return ClassNumbers(
            classes, {names[name]: i for i, name in enumerate(classes)}, []
        )

    known = sorted(number for number in numbers if number >= 0)
    if not known and numbers:
        raise UserError(
            f"all labels of {location} are {max(numbers)}: this split has no labels; "
            "take one that has, such as train or validation"
        )
    if not known:
        raise UserError(f"{location} has no labels: {_CONVERT}")
    # One stray label would otherwise make a tuple of billions of names.
    if known[-1] >= _MAX_CLASSES:
        raise UserError(
            f"{location} has the label {known[-1]}, which is too large: {_CONVERT}"
        )
    notes = []
    if known[0] == 1:
        notes.append(
            f"label 0 has no image in {location}, and is a class all the same: are "
            "labels counted from 1?"
        )
    classes = tuple(str(i) for i in range(known[-1] + 1))
    return ClassNumbers(classes, {number: number for number in known}, notes)
