"""Splits (train, val, test) as the names of files and folders tell them."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

_SPLIT_BY_WORD = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "eval": "eval",
    "evaluation": "eval",
    "holdout": "holdout",
    "trainval": "trainval",
}
# Words end at whatever is no letter, and before a capital: imagenet-train, train2017,
# trainA.
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
# A numbered shard as the hub names it, train-00000-of-00005: what stands before the
# number is a split, whatever word it is.
NUMBERED_NAME = re.compile(r"(.*?)[-_.]?(\d+)[-_]of[-_](\d+)", re.IGNORECASE)


class Split(NamedTuple):
    """Split that a name tells."""

    key: tuple[str, ...]
    """The same for every spelling of it."""
    text: str
    """As the name has it, for messages."""
    start: int
    """First character of the split's word in the name."""
    end: int
    """End of the word."""


def find_split(file_name: str) -> Split | None:
    """Find the split that the name of a file tells, or None.

    Args:
        file_name: name with its extension, without folders.
    """
    numbered = NUMBERED_NAME.match(file_name)
    stem = numbered[1] if numbered else file_name.rpartition(".")[0]
    words = [
        match for match in _WORD.finditer(stem) if match[0].lower() in _SPLIT_BY_WORD
    ]
    if words:
        key = tuple(_SPLIT_BY_WORD[match[0].lower()] for match in words)
        text = "-".join(match[0] for match in words)
        return Split(key, text, words[-1].start(), words[-1].end())
    if numbered and stem:
        return Split((stem.lower(),), stem, 0, len(stem))
    return None


def is_split_folder(name: str) -> bool:
    """Return whether a folder's name tells a split and nothing else, as train2017."""
    words = _WORD.findall(name)
    return bool(words) and all(word.lower() in _SPLIT_BY_WORD for word in words)


def find_split_folders(names: Sequence[str], paths: Sequence[str]) -> list[str]:
    """Find the folders that are splits and no classes; the training split comes first.

    These are folders whose names tell a split and nothing else, and those that differ
    in the split alone, as seg_train and seg_test do.

    Args:
        names: folders beside each other.
        paths: files below them; beside classes, only folders that hold folders are
            splits.

    Returns:
        At least two names, or none.
    """
    # Group the names by what is left without the split.
    key_by_name_by_rest: dict[str, dict[str, tuple[str, ...]]] = {}
    for name in names:
        split = find_split(f"{name}.")
        if split is not None:
            is_split = is_split_folder(name)
            rest = "" if is_split else f"{name[: split.start]}*{name[split.end :]}"
            key_by_name_by_rest.setdefault(rest, {})[name] = split.key
    splits: list[str] = []
    for rest, key_by_name in key_by_name_by_rest.items():
        if not rest or len(set(key_by_name.values())) > 1:
            splits += key_by_name

    # A class may be called train or test too.
    nested = {path.split("/")[0] for path in paths if path.count("/") > 1}
    if len(splits) < 2 or not (len(splits) == len(names) or nested >= set(splits)):
        return []
    return sorted(splits, key=lambda name: ("train" not in name.lower(), name))


def group_by_split(file_names: Sequence[str]) -> dict[str, list[str]]:
    """Group files by the split that their names tell; the training split comes first.

    Returns:
        Names by the text of their split. Names that tell none are left out.
    """
    names_by_key: dict[tuple[str, ...], list[str]] = {}
    text_by_key: dict[tuple[str, ...], str] = {}
    for name in file_names:
        split = find_split(name)
        if split is not None:
            names_by_key.setdefault(split.key, []).append(name)
            text_by_key.setdefault(split.key, split.text)
    keys = sorted(names_by_key, key=lambda key: ("train" not in key, key))
    return {text_by_key[key]: names_by_key[key] for key in keys}


def suggest_pattern(chosen: Sequence[str], others: Sequence[str]) -> str | None:
    """Return a pattern that matches the chosen names and none of the others, or None.

    Args:
        chosen: all names of one split.
        others: all other names of the folder.
    """
    if len(chosen) == 1:
        return chosen[0]
    name = chosen[0]
    split = find_split(name)
    assert split is not None
    # The word with the separators around it.
    end = split.end
    if name[end] in "-_.":
        end += 1
    start = split.start
    if start and name[start - 1] in "-_.":
        start -= 1
    for pattern in (f"{name[:end]}*", f"*{name[start:end]}*"):
        matches = [fnmatchcase(other, pattern) for other in others]
        if all(fnmatchcase(name, pattern) for name in chosen) and not any(matches):
            return pattern
    return None
