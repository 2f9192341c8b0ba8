"""Give a source the classes of a data set: a validation set those of training."""

from distrain.data.prepare.row_group_reader import RowGroupReader
from distrain.data.prepare.source import ImageSource
from distrain.data.shards.class_names import is_numbered, match_classes
from distrain.data.shards.manifest import Manifest
from distrain.data.storage.store import Store
from distrain.errors import UserError


def adopt_classes(source: ImageSource, reference_url: str) -> None:
    """Replace the classes of a source by all those of a data set, matched by name.

    Classes that are numbers without names are the data set's of the same numbers.

    Args:
        source: its classes may be fewer, and in another order.
        reference_url: URL of a packed or indexed data set.

    Raises:
        UserError: there is no data set at the URL, or it lacks a class of the source.
        AttemptError: the store of the data set does not answer.
    """
    store = Store(reference_url)
    reference = Manifest.load(store).classes
    numbers = _find_numbers(source, reference, store.redacted_url)
    source.blocks = [
        block._replace(label=numbers[block.label]) if block.label >= 0 else block
        for block in source.blocks
    ]
    # Labels of row groups are in their rows.
    if isinstance(source.reader, RowGroupReader):
        source.reader = source.reader.renumber(numbers)
    source.classes = reference


def _find_numbers(
    source: ImageSource, reference: tuple[str, ...], reference_url: str
) -> list[int]:
    """Return the number in the reference of each class of a source."""
    classes = source.classes
    location = source.store.redacted_url
    has_only_numbers = is_numbered(classes) and not set(classes) <= set(reference)
    if not has_only_numbers:
        return match_classes(classes, location, reference, reference_url)
    if len(classes) > len(reference):
        raise UserError(
            f"{location} has the label {classes[-1]}, but {reference_url} has "
            f"{len(reference)} classes: take the data set that the labels belong to"
        )
    source.notes.append(
        f"labels are numbers, taken for the classes of {reference_url} in their order: "
        f"0 is {reference[0]!r}"
    )
    return list(range(len(classes)))
