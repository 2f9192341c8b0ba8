"""Folder of one folder of images per class, as a source.

The first level of folders gives the classes, as in torchvision's ImageFolder: images
lie at any depth below it.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from distrain.data.prepare.class_folders import (
    check_is_class_root,
    has_image_name,
    note_other_files,
    note_similar_classes,
)
from distrain.data.prepare.junk import is_junk, is_unfinished
from distrain.data.prepare.shard_names import list_names
from distrain.data.prepare.source import (
    MAX_FILE_BYTES,
    Block,
    FileReader,
    ImageSource,
    Reject,
)
from distrain.data.storage.backend import DirectoryEntry
from distrain.data.storage.store import Store

_NUM_THREADS = 16
# Folders below each other; more of them are a loop that the store does not show.
_MAX_DEPTH = 32
# An image outside the class folders is rejected by name; any other file there is taken
# for a note, a list or a license and ignored.
USUAL_EXTENSIONS = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"}
# Others that are read, and formats that are rejected by name: convert them.
IMAGE_EXTENSIONS = {
    *USUAL_EXTENSIONS,
    *("jpe", "jfif", "jp2", "j2k", "avif", "pbm", "pgm", "pnm", "pam"),
    *("heic", "heif", "jxl", "dng", "cr2", "cr3", "nef", "arw"),
}


def has_image_extension(path: str) -> bool:
    """Return whether the last extension of a file name is one of images."""
    _, dot, extension = path.rpartition("/")[2].rpartition(".")
    return bool(dot) and extension.lower() in IMAGE_EXTENSIONS


@dataclass
class ClassFolder:
    """What lies below a folder of the first level."""

    name: str
    files: list[tuple[str, DirectoryEntry]] = field(default_factory=list)
    """Path and entry of each file."""
    rejects: list[Reject] = field(default_factory=list)
    """Folders that are not entered."""


class _Folder(NamedTuple):
    """Folder that is to be listed."""

    path: str
    class_folder: ClassFolder
    real_paths: tuple[str, ...]
    """Of it and of the folders around it, without links; empty if not on this
    machine."""


def open_image_folder(store: Store) -> ImageSource:
    """Open a folder of one folder of images per class.

    Raises:
        UserError: its folders are splits, or hold splits, shards or the folders of the
            classes.
        OSError: it cannot be read.
    """
    # The top level: folders are classes, images there belong to none.
    names: list[str] = []
    rejects: list[Reject] = []
    for entry in store.list_entries():
        if is_junk(entry.name):
            continue
        if entry.is_folder:
            names.append(entry.name)
        elif has_image_extension(entry.name):
            reason = "an image outside the class folders"
            rejects.append(Reject(to_display_name(entry.name), reason))
        elif entry.is_special:
            reason = f"{entry.problem}, not a class folder"
            rejects.append(Reject(to_display_name(entry.name), reason))

    # A folder without an image is no class.
    class_folders: list[ClassFolder] = []
    empty_names: list[str] = []
    all_paths: list[str] = []
    for folder in _list_class_folders(store, names):
        all_paths.extend(path for path, _ in folder.files)
        rejects.extend(folder.rejects)
        if any(has_image_name(path) for path, _ in folder.files):
            class_folders.append(folder)
        elif not folder.rejects:
            empty_names.append(to_display_name(folder.name))
    check_is_class_root(store, [folder.name for folder in class_folders], all_paths)

    # Labels follow the order of names.
    blocks: list[Block] = []
    other_names: list[str] = []
    for label, folder in enumerate(class_folders):
        for path, entry in folder.files:
            if not has_image_name(path):
                other_names.append(to_display_name(path))
                continue
            block = check_file(entry, path, label)
            if isinstance(block, Reject):
                rejects.append(block)
            else:
                blocks.append(block)

    classes = tuple(folder.name for folder in class_folders)
    reader = FileReader(store.url)
    source = ImageSource(store, "image folder", classes, blocks, reader, rejects)
    source.notes = note_similar_classes(classes)
    source.notes += note_other_files(other_names)
    if empty_names:
        source.notes.append(_describe_empty_folders(empty_names))
    return source


def list_files(store: Store) -> tuple[list[tuple[str, DirectoryEntry]], list[Reject]]:
    """Return path and entry of each file at any depth, and folders not entered.

    Junk is left out.
    """
    entries = [entry for entry in store.list_entries() if not is_junk(entry.name)]
    files = [(entry.name, entry) for entry in entries if not entry.is_folder]
    rejects: list[Reject] = []
    names = [entry.name for entry in entries if entry.is_folder]
    for folder in _list_class_folders(store, names):
        files.extend(folder.files)
        rejects.extend(folder.rejects)
    return files, rejects


def _list_class_folders(store: Store, names: Sequence[str]) -> list[ClassFolder]:
    """List the files below folders of the first level, in the order of their paths."""
    class_folders = [ClassFolder(name) for name in names]
    root = _find_real_paths(store, "", ())
    level: list[_Folder] = []
    for class_folder in class_folders:
        _enter_folder(store, class_folder.name, class_folder, root, level)

    # All folders of one depth in threads: each listing of a bucket is a request.
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        while level:
            paths = [folder.path for folder in level]
            next_level: list[_Folder] = []
            listings = pool.map(store.list_entries, paths)
            for folder, entries in zip(level, listings, strict=True):
                _sort_entries(store, folder, entries, next_level)
            level = next_level

    for class_folder in class_folders:
        class_folder.files.sort(key=lambda file: file[0].split("/"))
        class_folder.rejects.sort()
    return class_folders


def _sort_entries(
    store: Store,
    folder: _Folder,
    entries: Sequence[DirectoryEntry],
    next_level: list[_Folder],
) -> None:
    """Add the files of a folder to its class, and its folders to the next level."""
    class_folder = folder.class_folder
    for entry in entries:
        if is_junk(entry.name):
            continue
        path = f"{folder.path}/{entry.name}"
        if entry.is_folder:
            _enter_folder(store, path, class_folder, folder.real_paths, next_level)
        else:
            class_folder.files.append((path, entry))


def _enter_folder(
    store: Store,
    path: str,
    class_folder: ClassFolder,
    parent_real_paths: tuple[str, ...],
    level: list[_Folder],
) -> None:
    """Add a folder to a level, or to the rejects if it would be entered without end."""
    real_paths = _find_real_paths(store, path, parent_real_paths)
    display_name = to_display_name(path)
    # A link to a folder is followed, but not to one that the link lies in.
    if real_paths and real_paths[-1] in parent_real_paths:
        reason = "a link to a folder that it lies in"
        class_folder.rejects.append(Reject(display_name, reason))
    elif path.count("/") >= _MAX_DEPTH:
        reason = f"a folder below {_MAX_DEPTH} others"
        class_folder.rejects.append(Reject(display_name, reason))
    else:
        level.append(_Folder(path, class_folder, real_paths))


def _find_real_paths(
    store: Store, path: str, parent_real_paths: tuple[str, ...]
) -> tuple[str, ...]:
    if store.local_path is None:
        return ()
    return (*parent_real_paths, os.path.realpath(store.resolve_path(path)))


def check_file(entry: DirectoryEntry, path: str, label: int) -> Block | Reject:
    """Return the block of a file in a class folder, or why it cannot be an image."""
    display_name = to_display_name(path)
    if entry.is_special:
        reason = f"{entry.problem} where an image should be"
        return Reject(display_name, reason)
    if is_unfinished(entry.name):
        return Reject(display_name, "an unfinished download")
    size = entry.size or 0
    if size > MAX_FILE_BYTES:
        reason = f"{size} bytes are over the limit of {MAX_FILE_BYTES}"
        return Reject(display_name, reason)
    return Block(path, display_name, label, None, size)


def to_display_name(path: str) -> str:
    """Return the name of a file as text that can be printed and stored."""
    # A file name may be any bytes, and rejects are written as UTF-8.
    return path.encode("utf-8", "backslashreplace").decode()


def _describe_empty_folders(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"the folder {names[0]} holds no image, so it is no class"
    return (
        f"{len(names):,} folders hold no image, so they are no classes: "
        f"{list_names(names)}"
    )
