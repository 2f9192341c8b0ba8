"""Names of the shards of a folder: their kind, their numbers, and copies of them.

What the names show is checked before any file is read: that the files are one split,
and all of it.
"""

import re
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from distrain.data.prepare.junk import is_junk, is_unfinished
from distrain.data.prepare.source import OPENERS_BY_EXTENSION
from distrain.data.prepare.splits import NUMBERED_NAME, group_by_split, suggest_pattern
from distrain.data.storage.backend import DirectoryEntry
from distrain.data.storage.url import join_url
from distrain.errors import UserError

COMPRESSED_EXTENSIONS = {"7z", "bz2", "gz", "rar", "tgz", "xz", "zip", "zst"}
_EXTENSION_BY_ALIAS = {"pq": "parquet", "parq": "parquet"}
# What browsers and file managers append to, or put before, the name of a copy.
_COPY_WORD = "copy|kopie|copie|copia|cópia"
_COPY_MARK = re.compile(
    rf"\ ?\(\d+\)|\ -\ ({_COPY_WORD})(\ ?\(\d+\))?|\ ({_COPY_WORD})(\ \d+)?"
    rf"|\ \((another\ |\d+(st|nd|rd|th)\ )?({_COPY_WORD})(\ \d+)?\)"
    r"|\ \([^()]*conflicted\ copy[^()]*\)",
    re.IGNORECASE,
)
_COPY_OF = re.compile(r"(copy of|kopie von|copie de|copia de|cópia de) ", re.IGNORECASE)
_LAST_NUMBER = re.compile(r"(.*?)(\d+)(\D*)$")
_MAX_SHOWN_NAMES = 4


class _NumberedFile(NamedTuple):
    """File of a set whose size its name tells: train-00000-of-00005."""

    name: str
    stem: str
    """What stands before the number."""
    number: str
    total: str


def get_shard_extension(name: str) -> str:
    """Return the extension by which a file is opened; "" if it is of no such kind."""
    extension = name.rpartition(".")[2].lower() if "." in name else ""
    extension = _EXTENSION_BY_ALIAS.get(extension, extension)
    return extension if extension in OPENERS_BY_EXTENSION else ""


def is_shard_name(name: str) -> bool:
    """Return whether a file is an archive or a Parquet file by its name."""
    return get_shard_extension(name) != ""


def strip_copy_mark(stem: str) -> str | None:
    """Return the name that one without extension is a copy of, or None.

    Programs name a copy of x `x (1)`, `x - Copy` or `Copy of x`.
    """
    prefix = _COPY_OF.match(stem)
    if prefix is not None:
        return stem[prefix.end() :]
    # Of x.snappy.parquet, both x (1).snappy and x.snappy (1) are usual.
    for mark in _COPY_MARK.finditer(stem):
        if mark.end() == len(stem) or stem[mark.end()] == ".":
            return stem[: mark.start()] + stem[mark.end() :]
    return None


def select_shards(
    entries: Sequence[DirectoryEntry], url: str
) -> tuple[list[DirectoryEntry], list[str]]:
    """Select the archives or the Parquet files among the entries of a folder.

    Args:
        entries: files and folders.
        url: of the folder, for messages.

    Returns:
        The files, and a sentence for what is left out and may hold images.

    Raises:
        UserError: there are archives and Parquet files.
    """
    files: list[DirectoryEntry] = []
    left_out: list[str] = []
    for entry in entries:
        if is_junk(entry.name):
            continue
        if entry.is_folder or _is_unread_shard(entry.name):
            left_out.append(entry.name)
        elif is_shard_name(entry.name):
            files.append(entry)
    extensions = sorted({get_shard_extension(file.name) for file in files})
    if len(extensions) > 1:
        suffix = files[-1].name.rpartition(".")[2]
        raise UserError(
            f"{url} holds files of several kinds ({', '.join(extensions)}): take one "
            f"kind, such as '{join_url(url, f'*.{suffix}')}'"
        )
    notes: list[str] = []
    if files and left_out:
        notes.append(
            f"only .{extensions[0]} files are read in {url}: "
            f"left out {list_names(left_out)}"
        )
    return files, notes


def check_one_set(
    names: Sequence[str], other_names: Sequence[str], url: str, *, is_whole_folder: bool
) -> list[str]:
    """Check that shards are one split, complete, and none of them a copy of another.

    Args:
        names: files that are opened.
        other_names: other names in their folder.
        url: of the folder, for messages.
        is_whole_folder: whether they are all shards of it, not those of a pattern.

    Returns:
        A sentence for each thing that the user should know.

    Raises:
        UserError: they are not.
    """
    _check_copies(names, url)
    _check_splits(names, other_names, url)
    return _check_numbers(names, url, is_whole_folder=is_whole_folder)


def _check_copies(names: Sequence[str], url: str) -> None:
    """Raise UserError if a file is a copy of another one by its name."""
    known_names = set(names)
    for name in names:
        stem, _, extension = name.rpartition(".")
        original = f"{strip_copy_mark(stem)}.{extension}"
        if original in known_names:
            raise UserError(
                f"{url} holds {name!r}, which looks like a copy of {original!r}: "
                "delete one of them, so that its images do not count twice"
            )


def _check_splits(names: Sequence[str], other_names: Sequence[str], url: str) -> None:
    """Raise UserError if files belong to several splits."""
    names_by_split = group_by_split(names)
    if len(names_by_split) < 2:
        return
    # Name the first split for which a pattern matches its files alone.
    advice = "move the files of each into a folder of its own"
    for chosen in names_by_split.values():
        others = {*names, *other_names} - set(chosen)
        pattern = suggest_pattern(chosen, sorted(others))
        if pattern is not None:
            advice = f"take one of them, such as '{join_url(url, pattern)}'"
            break
    splits = ", ".join(names_by_split)
    raise UserError(f"{url} holds several splits ({splits}): {advice}")


def _check_numbers(
    names: Sequence[str], url: str, *, is_whole_folder: bool
) -> list[str]:
    """Return a sentence for each set that is a part. Raises UserError."""
    numbered: list[_NumberedFile] = []
    other_names: list[str] = []
    for name in names:
        match = NUMBERED_NAME.match(name)
        if match is None:
            other_names.append(name)
        else:
            numbered.append(_NumberedFile(name, *match.groups()))
    notes = _find_gaps(other_names)

    files_by_stem: dict[str, list[_NumberedFile]] = {}
    for file in numbered:
        files_by_stem.setdefault(file.stem, []).append(file)
    for name in other_names:
        twin = files_by_stem.get(name.rpartition(".")[0])
        if twin is not None:
            raise UserError(
                f"{url} holds {name} and {twin[0].name}, which look like one set as a "
                "whole and in shards: take one of them with a pattern"
            )
    for files in files_by_stem.values():
        first = files[0]
        # Sets of several totals are the leftovers of an earlier version.
        for file in files[1:]:
            if int(file.total) != int(first.total):
                raise UserError(
                    f"{url} holds {first.name} and {file.name}, which are of two "
                    "versions of a set: delete the files of one of them"
                )
        missing = _list_missing(files, url)
        if missing and is_whole_folder:
            start = first.name.index(first.number, len(first.stem))
            pattern = join_url(url, f"{first.name[:start]}*")
            raise UserError(
                f"{url} lacks {missing}: download what is missing, or take the others "
                f"on purpose with a pattern such as '{pattern}'"
            )
        if missing:
            notes.append(f"a part of a set is taken: left out {missing}")
    return notes


def _list_missing(files: Sequence[_NumberedFile], url: str) -> str:
    """Return the names that a set lacks, "" for none.

    Raises:
        UserError: a number stands twice.
    """
    first = files[0]
    file_by_number: dict[int, _NumberedFile] = {}
    for file in files:
        other = file_by_number.setdefault(int(file.number), file)
        if other is not file:
            raise UserError(
                f"{url} holds {other.name} and {file.name}, which are the same shard: "
                "delete one of them"
            )

    # Most count from 0; a few from 1.
    total = int(first.total)
    start = 1 if total in file_by_number and 0 not in file_by_number else 0
    numbers = range(start, start + total)
    num_missing = total - sum(number in numbers for number in file_by_number)
    missing = (number for number in numbers if number not in file_by_number)

    # Name them like the first file, but for a hash after the numbers.
    match = NUMBERED_NAME.match(first.name)
    assert match is not None
    before = first.name[: match.start(2)]
    after = first.name[match.end(2) : match.end(3)]
    rest = first.name[match.end(3) :]
    if rest.startswith("."):
        after += rest
    names = [
        f"{before}{number:0{len(first.number)}d}{after}"
        for number in islice(missing, _MAX_SHOWN_NAMES)
    ]
    return list_names(names, num_missing) if names else ""


def _find_gaps(names: Sequence[str]) -> list[str]:
    """Return a sentence for each series of numbered files in which some are missing."""
    numbers_by_series: dict[tuple[str, str, int], set[int]] = {}
    for name in names:
        match = _LAST_NUMBER.match(name)
        if match is not None:
            before, number, after = match.groups()
            series = (before, after, len(number))
            numbers_by_series.setdefault(series, set()).add(int(number))
    notes: list[str] = []
    for (before, after, width), numbers in numbers_by_series.items():
        # More gaps than files are no gaps: these numbers are dates, say.
        num_missing = max(numbers) - min(numbers) + 1 - len(numbers)
        if 0 < num_missing < len(numbers):
            first = next(
                n for n in range(min(numbers), max(numbers)) if n not in numbers
            )
            notes.append(
                f"{num_missing:,} of the numbered files are missing, the first "
                f"{before}{first:0{width}d}{after}"
            )
    return notes


def _is_unread_shard(name: str) -> bool:
    """Return whether a name is that of a shard that is compressed or not complete."""
    stem, _, extension = name.rpartition(".")
    is_unread = extension.lower() in COMPRESSED_EXTENSIONS or extension.isdecimal()
    return is_unfinished(name) or (is_unread and is_shard_name(stem))


def list_names(names: Sequence[str], num_names: int | None = None) -> str:
    """Return the first few names, and how many more there are.

    Args:
        names: all of them, or the first few.
        num_names: number of all; None: the length of `names`.
    """
    shown = ", ".join(names[:_MAX_SHOWN_NAMES])
    num_hidden = (num_names or len(names)) - _MAX_SHOWN_NAMES
    return f"{shown} and {num_hidden:,} more" if num_hidden > 0 else shown
