"""Match a list of labels with the images of an archive."""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

from distrain.data.prepare.class_numbers import LabelValue
from distrain.data.prepare.image_folder import IMAGE_EXTENSIONS
from distrain.data.prepare.label_list import Label, read_label_list
from distrain.errors import UserError

_INTEGER = re.compile(r"(-?(?:0|[1-9][0-9]*))(?:\.0+)?")
# From so many images on, labels that are all different are no classes.
_MIN_UNIQUE_LABELS = 10
_MIN_UNIQUE_LINES = 3
_SHOW_TABLE = (
    "a list has one class per image, or lines of file and class with a comma, a "
    "semicolon, a tab or a space between them"
)


class MatchedLabels(NamedTuple):
    """Label of each image for which a list has one."""

    value_by_file: dict[str, LabelValue]
    notes: list[str]
    """What the user should know, one sentence each."""


class _Entry(NamedTuple):
    """Name in a list, and its label."""

    path: tuple[str, ...]
    label: Label


class _ListedNames:
    """Names in a list, found by those of images."""

    def __init__(self) -> None:
        self._by_stem: dict[str, list[_Entry]] = {}
        # Where classes are folders, each may have an image of the same name.
        self._by_folder_and_stem: dict[tuple[str, str], list[_Entry]] = {}

    def add(self, entry: _Entry) -> None:
        """Add a name, which may lack its extension."""
        stem = _get_stem(entry.path[-1])
        place = (_get_folder(entry.path), stem)
        self._by_stem.setdefault(stem, []).append(entry)
        self._by_folder_and_stem.setdefault(place, []).append(entry)

    def find_in_folder(self, path: tuple[str, ...]) -> list[_Entry]:
        """Return the entries of an image's name that have its folder, or none.

        If the image itself has no folder, return all.
        """
        folder = _get_folder(path)
        if not folder:
            return self.find_anywhere(path)
        return [
            entry
            for stem in _list_stems(path[-1])
            for place in (folder, "")
            for entry in self._by_folder_and_stem.get((place, stem), [])
        ]

    def find_anywhere(self, path: tuple[str, ...]) -> list[_Entry]:
        """Return all entries of an image's name, whatever their folder."""
        stems = _list_stems(path[-1])
        return [entry for stem in stems for entry in self._by_stem.get(stem, [])]


class _NameIndex:
    """Names of images, found again in other spellings.

    A list may leave out folders and extensions, or write accents as other code points.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self._paths: set[tuple[str, ...]] = set()
        self._names: set[str] = set()
        self._stems: Counter[str] = Counter()
        for file in files:
            path = _split_path(file)
            name = path[-1]
            self._paths.update(path[i:] for i in range(len(path)))
            self._names.add(name)
            for stem in _list_stems(name):
                self._stems[stem] += 1

    def score(self, cell: str) -> int:
        """Return how surely a cell is the name of an image.

        3: it may only lack folders; 2: it has other folders; 1: it has another
        extension, or none; 0: it is no name of an image.
        """
        path = _split_path(cell)
        if not path:
            return 0
        if path in self._paths:
            return 3
        if path[-1] in self._names:
            return 2
        return int(_get_stem(path[-1]) in self._stems)

    def is_unique(self, stem: str) -> bool:
        return self._stems[stem] == 1


def match_labels(
    files: Sequence[str], text: str, location: str, list_location: str
) -> MatchedLabels:
    """Return the label of each image for which a list has exactly one.

    Labels that are all integers are numbers; otherwise they are names.

    Args:
        files: images of an archive, in the order that a list of labels alone follows.
        text: the list.
        location: the archive, for messages.
        list_location: the list, for messages.

    Raises:
        UserError: the list is of labels alone and not one per file, contradicts itself,
            names no image, or does not label classes.
    """
    index = _NameIndex(files)
    table = read_label_list(text, index.score, list_location)
    notes = list(table.notes)
    if table.has_files:
        label_by_file, unused = _match_files(files, table.labels, index, list_location)
        if unused and not label_by_file:
            raise UserError(
                f"{list_location} names no image of {location} (first: "
                f"{unused[0].file}): check that it is the list of these images"
            )
        if unused:
            lines = "1 line" if len(unused) == 1 else f"{len(unused)} lines"
            notes.append(
                f"no image of {location} has the name in {lines} of {list_location} "
                f"(first: {unused[0].file})"
            )
    else:
        check_count(len(table.labels), len(files), location)
        labels = [label.label for label in table.labels]
        _check_names_no_file(table.labels, list_location)
        min_unique = _MIN_UNIQUE_LINES if table.has_separators else _MIN_UNIQUE_LABELS
        check_is_labeling(labels, list_location, min_unique)
        label_by_file = dict(zip(files, labels, strict=True))
        notes.extend(_describe_order(files, list_location))
    label_by_file = {file: label for file, label in label_by_file.items() if label}
    check_is_labeling(list(label_by_file.values()), list_location)

    # Numbers, only if they all are.
    matches = {label: _INTEGER.fullmatch(label) for label in label_by_file.values()}
    number_by_label = {
        label: int(match[1]) for label, match in matches.items() if match
    }
    if len(number_by_label) == len(matches):
        return MatchedLabels(
            {file: number_by_label[label] for file, label in label_by_file.items()},
            notes,
        )
    if number_by_label:
        name = next(label for label in matches if label not in number_by_label)
        notes.append(
            f"the labels of {list_location} are taken for names, since {name!r} is no "
            "number"
        )
    return MatchedLabels(dict(label_by_file), notes)


def _describe_order(files: Sequence[str], list_location: str) -> list[str]:
    """Return a note if names and the numbers in them have different orders."""

    def get_natural_key(file: str) -> list[tuple[int, str]]:
        parts = re.split(r"([0-9]+)", file)
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]

    for file, other in zip(files, sorted(files, key=get_natural_key), strict=True):
        if file != other:
            return [
                f"labels of {list_location} belong to the images in the order of their "
                f"names, in which {file} comes before {other}: check that the list has "
                "that order, or add the names to it"
            ]
    return []


def check_count(num_labels: int, num_files: int, location: str) -> None:
    """Raise UserError unless there is one label per file."""
    if num_labels != num_files:
        raise UserError(
            f"the list has {num_labels} labels for {num_files} files in {location}: it "
            "must have one per file"
        )


def check_is_labeling(
    labels: Collection[str], location: str, min_images: int = _MIN_UNIQUE_LABELS
) -> None:
    """Raise UserError if each of many images has a label of its own."""
    if len(labels) >= min_images and len(set(labels)) == len(labels):
        raise UserError(
            f"{location} has as many classes as images, {len(labels)} (first: "
            f"{next(iter(labels))}): {_SHOW_TABLE}"
        )


def _check_names_no_file(labels: Sequence[Label], location: str) -> None:
    """Raise UserError if a label has the name of an image in it."""
    pattern = rf"\.({'|'.join(sorted(IMAGE_EXTENSIONS))})\b"
    for label in labels:
        if re.search(pattern, label.label, re.IGNORECASE):
            raise UserError(
                f"line {label.line_number} of {location} is taken for a label, and "
                f"names an image that the archive does not have ({label.label}): "
                f"{_SHOW_TABLE}"
            )


def _match_files(
    files: Sequence[str], labels: Sequence[Label], index: _NameIndex, location: str
) -> tuple[dict[str, str], list[Label]]:
    """Return the label of each file, and the lines that are of none."""
    # A file may stand in the list several times, with one label.
    entry_by_path: dict[tuple[str, ...], _Entry] = {}
    listed = _ListedNames()
    for label in labels:
        path = _split_path(label.file)
        if not path:
            continue
        if path not in entry_by_path:
            entry = _Entry(path, label)
            entry_by_path[path] = entry
            listed.add(entry)
        elif entry_by_path[path].label.label != label.label:
            first = entry_by_path[path].label
            raise UserError(
                f"{location} gives {label.file} two labels, {first.label} in line "
                f"{first.line_number} and {label.label} in line {label.line_number}: "
                "keep the right one"
            )

    label_by_file: dict[str, str] = {}
    file_by_path: dict[tuple[str, ...], str] = {}
    for file in files:
        entries = _find_entries(_split_path(file), listed, index)
        # A name without folders may be that of several images.
        for entry in entries:
            other = file_by_path.setdefault(entry.path, file)
            if other != file:
                raise UserError(
                    f"line {entry.label.line_number} of {location}, "
                    f"{entry.label.file}, may be {other} or {file}: write the names "
                    "with their folders and extensions"
                )
        found = {entry.label.label for entry in entries}
        if len(found) == 1:
            (label_by_file[file],) = found
    unused = [
        entry.label for path, entry in entry_by_path.items() if path not in file_by_path
    ]
    return label_by_file, unused


def _find_entries(
    path: tuple[str, ...], listed: _ListedNames, index: _NameIndex
) -> list[_Entry]:
    """Return the entries whose name fits a file best."""
    entries = listed.find_in_folder(path)
    best = max((_rank(path, entry.path) for entry in entries), default=None)
    # Another folder is another file, unless the name is that of one image alone.
    if best is None or not best[0]:
        if not index.is_unique(_get_stem(path[-1])):
            return []
        entries = listed.find_anywhere(path)
        best = max((_rank(path, entry.path) for entry in entries), default=None)
    return [entry for entry in entries if _rank(path, entry.path) == best]


def _rank(
    file: tuple[str, ...], entry: tuple[str, ...]
) -> tuple[bool, int, bool, bool]:
    """Return how well the path of a file and one in a list agree."""
    num_common = 0
    for left, right in zip(file[-2::-1], entry[-2::-1], strict=False):
        if left != right:
            break
        num_common += 1
    is_same_folder = num_common == min(len(file), len(entry)) - 1
    return is_same_folder, num_common, file[-1] == entry[-1], len(file) == len(entry)


def _split_path(name: str) -> tuple[str, ...]:
    if not name.isascii():
        name = unicodedata.normalize("NFC", name)
    name = name.replace("\\", "/")
    return tuple(part for part in name.split("/") if part not in ("", "."))


def _get_folder(path: tuple[str, ...]) -> str:
    """Return the folder right around a file, "" for none."""
    return path[-2] if len(path) > 1 else ""


def _list_stems(name: str) -> set[str]:
    """Return what a list may call a file: its name, with or without extension."""
    return {name, name.rpartition(".")[0]} - {""}


def _get_stem(name: str) -> str:
    """Return a file name without the extension of an image."""
    stem, _, extension = name.rpartition(".")
    return stem if stem and extension.lower() in IMAGE_EXTENSIONS else name
