"""Labels of bare images, in an archive or a folder, from a list or a devkit."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from distrain.data.prepare.class_numbers import LabelValue, number_classes
from distrain.data.prepare.label_match import check_count, match_labels
from distrain.data.prepare.labels import read_devkit, read_text
from distrain.data.storage.store import Store


class LabeledImages(NamedTuple):
    """Classes of images, and the label of each image that has one."""

    classes: Sequence[str]
    label_by_name: Mapping[str, int]
    reason_by_name: Mapping[str, str]
    """Why each of the others has none."""
    notes: list[str]
    """What the user should know, one sentence each."""


def label_images(names: Sequence[str], labels_url: str, location: str) -> LabeledImages:
    """Match images with a list of labels, and number the classes.

    Args:
        names: images, in the order that a list of labels alone follows.
        labels_url: the devkit of ILSVRC-2012, or a list: one label per image in the
            order of their names, or a table of images and labels.
        location: the archive or folder of the images, for messages.

    Raises:
        UserError: the list does not fit the images.
    """
    value_by_name: Mapping[str, LabelValue]
    if labels_url.endswith((".tar.gz", ".tgz")):
        truth, synsets = read_devkit(labels_url)
        check_count(len(truth), len(names), location)
        value_by_name = dict(zip(names, truth, strict=True))
        values: Iterable[LabelValue] = synsets
        notes: list[str] = []
    else:
        list_location = Store(labels_url).redacted_url
        value_by_name, notes = match_labels(
            names, read_text(labels_url), location, list_location
        )
        values = value_by_name.values()
    numbers = number_classes(values, location)

    label_by_name: dict[str, int] = {}
    reason_by_name: dict[str, str] = {}
    for name in names:
        if name not in value_by_name:
            reason_by_name[name] = "the list has no label for it"
        elif value_by_name[name] in numbers.number_by_value:
            label_by_name[name] = numbers.number_by_value[value_by_name[name]]
        else:
            reason_by_name[name] = f"label {value_by_name[name]}: no label"
    return LabeledImages(
        numbers.classes, label_by_name, reason_by_name, [*notes, *numbers.notes]
    )
