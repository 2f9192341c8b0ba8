"""Random folders of class folders, read by a plain walk."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st
from structure.common import (
    IMAGE_SUFFIXES,
    JUNK,
    OTHER_SUFFIXES,
    RARE_SUFFIXES,
    Found,
    Kind,
    Reading,
    Refusal,
    count_other_files,
    escape,
    get_suffix,
    is_image_name,
    is_junk_path,
    label_data,
    make_pool,
)

# No word of these tells a split.
CLASSES = (
    "cat",
    "dog",
    "Dog",
    "golden retriever",
    "caf\u00e9",
    "cafe\u0301",
    "a'b\"c",
    "x.tar",
    "y.parquet",
    "a.jpg",
    "line\nbreak",
    "bytes\udcff",
    "n" * 200,
    "-1",
    " space ",
)
SPLITS = {
    "train": "train",
    "Training": "train",
    "val": "val",
    "validation": "val",
    "test": "test",
    "train2017": "train",
}
_STEMS = ("0", "1", "a b", "\u00e9", "e\u0301", "q'", "n\nl", "b\udcfe", "z" * 150)
_LINKS = ("up", "root", "sibling", "broken", "file")


class Entry(NamedTuple):
    """One thing below the root."""

    parts: tuple[str, ...]
    kind: str
    """image, text, empty, folder, pipe, or what a link leads to."""
    image: int


def _file_names() -> st.SearchStrategy[str]:
    suffixes = st.sampled_from(IMAGE_SUFFIXES + RARE_SUFFIXES + OTHER_SUFFIXES)
    named = st.builds("{}.{}".format, st.sampled_from(_STEMS), suffixes)
    return named | st.sampled_from(JUNK) | st.sampled_from(("IMG_1", "0.part"))


@st.composite
def _entries(draw: st.DrawFn, first: tuple[str, ...]) -> list[Entry]:
    entries: list[Entry] = []
    kinds = st.sampled_from(
        ("image", "image", "image", "image", "text", "empty", "folder", "pipe", "link")
    )
    inner = st.sampled_from(("part1", "a.jpg", *JUNK[9:13], "deep", *list(SPLITS)[:4]))
    for _ in range(draw(st.integers(1, 9))):
        depth = draw(st.sampled_from((0, 1, 1, 1, 1, 2, 3)))
        parts = [draw(st.sampled_from(first))] if depth else []
        parts += [draw(inner) for _ in range(depth - 1)]
        kind = draw(kinds)
        if kind == "link":
            kind = draw(st.sampled_from(_LINKS))
        name = draw(_file_names())
        entries.append(Entry((*parts, name), kind, draw(st.integers(0, 39))))
    return entries


@st.composite
def folder_cases(draw: st.DrawFn) -> list[Entry]:
    """A few class folders with most entries in them."""
    pool = CLASSES
    if draw(st.integers(0, 9)) == 0:
        pool = tuple(SPLITS)
    first = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=4, unique=True))
    return draw(_entries(tuple(first)))


def write_folder(case: list[Entry], folder: Path) -> dict[str, Any]:
    """Write the entries whose place is free."""
    root = folder / "photos"
    root.mkdir()
    for entry in case:
        path = root.joinpath(*entry.parts)
        blocked = [p for p in path.parents if os.path.lexists(p) and not p.is_dir()]
        if os.path.lexists(path) or blocked:
            continue
        # Nothing is written behind a link.
        if any(parent.is_symlink() for parent in path.parents):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if entry.kind == "image":
            path.write_bytes(make_pool()[entry.image])
        elif entry.kind in ("text", "empty"):
            path.write_bytes(b"notes" if entry.kind == "text" else b"")
        elif entry.kind == "folder":
            path.mkdir()
        elif entry.kind == "pipe":
            os.mkfifo(path)
        else:
            _write_link(path, root, entry)
    return {"url": str(root)}


def _write_link(path: Path, root: Path, entry: Entry) -> None:
    if entry.kind == "up":
        target = path.parent
    elif entry.kind == "root":
        target = root
    elif entry.kind == "sibling":
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.is_symlink())
        target = folders[entry.image % len(folders)] if folders else root
    elif entry.kind == "file":
        target = root.parent / "elsewhere"
        target.write_bytes(make_pool()[entry.image])
    else:
        target = root / "nowhere"
    path.symlink_to(target)


class _Walk:
    """Everything below one class folder that is no junk."""

    def __init__(self, root: str, name: str) -> None:
        self.files: list[str] = []
        self.loops: list[str] = []
        self._root = root
        self._enter(name, (os.path.realpath(root),))

    def _enter(self, path: str, around: tuple[str, ...]) -> None:
        real = os.path.realpath(os.path.join(self._root, path))
        if real in around:
            self.loops.append(path)
            return
        for name in os.listdir(os.path.join(self._root, path)):
            inner = f"{path}/{name}"
            if is_junk_path(name):
                continue
            if os.path.isdir(os.path.join(self._root, inner)):
                self._enter(inner, (*around, real))
            else:
                self.files.append(inner)


def read_folder(case: list[Entry], options: dict[str, Any]) -> Reading | Refusal:
    """Read a folder of class folders as the documentation says."""
    root = options["url"]
    rejects: list[str] = []
    walks: dict[str, _Walk] = {}
    for name in os.listdir(root):
        path = os.path.join(root, name)
        if is_junk_path(name):
            continue
        if os.path.isdir(path):
            walks[name] = _Walk(root, name)
        elif is_image_name(name) or not os.path.isfile(path):
            rejects.append(name)

    # A folder without images is no class, and named.
    mentions: list[str] = []
    classes: list[str] = []
    for name, walk in sorted(walks.items()):
        rejects += walk.loops
        if any(get_suffix(path) not in OTHER_SUFFIXES for path in walk.files):
            classes.append(name)
        else:
            mentions += [] if walk.loops else [name]
    if len(classes) < 2:
        return Refusal([root])
    if _has_splits(classes, [path for name in walks for path in walks[name].files]):
        return Refusal([root])

    images: list[Found] = []
    others: list[str] = []
    for name in classes:
        for path in walks[name].files:
            place = Path(root, path)
            if get_suffix(path) in OTHER_SUFFIXES:
                others.append(path)
            elif not place.is_file() or path.endswith(".part"):
                rejects.append(path)
            else:
                images.append(Found(escape(path), name, label_data(place.read_bytes())))
    if not images:
        return Refusal([root])
    rejects = [escape(name) for name in rejects]
    counts = count_other_files(others)
    return Reading(images, tuple(classes), rejects, mentions, counts)


def _has_splits(classes: list[str], paths: list[str]) -> bool:
    """Whether the classes, or the folders in one of them, are several splits."""
    if all(name in SPLITS for name in classes):
        return True
    splits: dict[str, set[str]] = {name: set() for name in classes}
    for path in paths:
        name, inner, *rest = path.split("/")
        is_image = get_suffix(path) not in OTHER_SUFFIXES
        if rest and inner in SPLITS and is_image and name in splits:
            splits[name].add(SPLITS[inner])
    return any(len(found) > 1 for found in splits.values())


FOLDERS = Kind(folder_cases(), write_folder, read_folder)
