"""Classes of one data set found by their names among those of another one."""

import unicodedata
from collections import Counter
from collections.abc import Sequence

from distrain.errors import UserError


def match_classes(
    classes: Sequence[str], location: str, reference: Sequence[str], reference_url: str
) -> list[int]:
    """Return the number in the reference of each class.

    Classes may be fewer than those of the reference, and in another order.

    Args:
        classes: class names of a data set, by label.
        location: where that data set is, for messages.
        reference: class names of the other data set, by label.
        reference_url: where that one is, for messages.

    Raises:
        UserError: a class is not in the reference, or a name stands for two classes.
    """
    # A name that stands twice matches only where all names are the same.
    if tuple(classes) == tuple(reference):
        return list(range(len(reference)))
    _check_unique(classes, location)
    _check_unique(reference, reference_url)

    numbers = {name: number for number, name in enumerate(reference)}
    for label, name in enumerate(classes):
        if name not in numbers:
            problem = _explain_difference(name, reference)
            remedy = "rename or remove that class"
            if is_numbered(classes):
                remedy = f"pack it with --classes-of {reference_url}"
            raise UserError(
                f"class {label} of {location}, {name!r}, is not one of the "
                f"{len(reference)} classes of {reference_url}{problem}: classes are "
                f"matched by name, so {remedy}"
            )
    return [numbers[name] for name in classes]


def is_numbered(classes: Sequence[str]) -> bool:
    """Return whether classes have no names but their numbers."""
    return all(name == str(label) for label, name in enumerate(classes))


def _check_unique(classes: Sequence[str], location: str) -> None:
    """Raise UserError if two classes have the same name."""
    ((name, count),) = Counter(classes).most_common(1)
    if count > 1:
        raise UserError(
            f"{location} has {count} classes called {name!r}, which cannot be matched "
            "by name with those of another data set: give each class a name of its "
            "own, for example with --names"
        )


def _explain_difference(name: str, reference: Sequence[str]) -> str:
    """Return the class that looks the same, and how it differs; "" if there is none."""
    for other in reference:
        difference = describe_difference(name, other)
        if difference is not None:
            return f", which has {other!a}, not {name!a} (they {difference})"
    return ""


def describe_difference(name: str, other: str) -> str | None:
    """Return how two different names differ that look the same; None if they do not."""
    if fold_name(name) != fold_name(other):
        return None
    if unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", other):
        return "differ in their Unicode form, NFC and NFD"
    if " ".join(name.split()) == " ".join(other.split()):
        return "differ in their spaces"
    if name.casefold() == other.casefold():
        return "differ in upper and lower case"
    return "differ in case, spaces or Unicode form"


def fold_name(name: str) -> str:
    """Return one text for all names that a reader takes for the same.

    They differ in case, in white space, or in how accents are encoded.
    """
    text = unicodedata.normalize("NFKC", name).casefold()
    return " ".join(text.split())
