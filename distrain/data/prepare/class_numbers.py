"""Classes of labels that a source holds as values: numbers, text or booleans."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from distrain.data.shards.class_names import fold_name
from distrain.errors import UserError

LabelValue: TypeAlias = int | str | bool
"""Label as a source stores it."""
_MAX_CLASSES = 1 << 20
CONVERT = "labels are numbers from 0, one per class, or names"
"""Requirement on labels, for error messages."""


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
            f"{min(names)!r}: {CONVERT}"
        )
    if names:
        classes = tuple(sorted(names))
        number_by_value = {names[name]: i for i, name in enumerate(classes)}
        return ClassNumbers(classes, number_by_value, note_lookalikes(classes))

    known = sorted(number for number in numbers if number >= 0)
    if not known and numbers:
        raise UserError(
            f"all labels of {location} are {max(numbers)}: this split has no labels; "
            "take one that has, such as train or validation"
        )
    if not known:
        raise UserError(f"{location} has no labels: {CONVERT}")
    # One stray label would otherwise make a tuple of billions of names.
    if known[-1] >= _MAX_CLASSES:
        raise UserError(
            f"{location} has the label {known[-1]}, which is too large: {CONVERT}"
        )
    classes = tuple(str(i) for i in range(known[-1] + 1))
    number_by_value = {number: number for number in known}
    return ClassNumbers(classes, number_by_value, _note_gaps(known, location))


def _note_gaps(known: Sequence[int], location: str) -> list[str]:
    """Return notes on the numbers below the largest label that no image has."""
    if known[0] == 1:
        return [
            f"label 0 has no image in {location}, and is a class all the same: are "
            "labels counted from 1?"
        ]
    num_missing = known[-1] + 1 - len(known)
    if not num_missing:
        return []
    known_numbers = set(known)
    first = next(i for i in range(known[-1]) if i not in known_numbers)
    return [
        f"{num_missing} of the labels 0 to {known[-1]}, such as {first}, have no image "
        f"in {location}, and are classes all the same"
    ]


def find_lookalikes(names: Iterable[str]) -> list[list[str]]:
    """Return groups of names that a reader takes for the same."""
    groups: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        groups.setdefault(fold_name(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def note_lookalikes(classes: Iterable[str]) -> list[str]:
    """Return a note if classes look the same, as find_lookalikes says."""
    groups = find_lookalikes(classes)
    if not groups:
        return []
    # ascii shows what differs between names that are printed alike.
    example = " and ".join(ascii(name) for name in groups[0])
    others = f" (and {len(groups) - 1} more)" if len(groups) > 1 else ""
    return [
        f"{example}{others} look the same and are different classes: give them one "
        "name if one class is meant"
    ]
