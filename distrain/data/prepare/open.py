"""Open a URL as a source: an image folder, archives, hub Parquet or WebDataset."""

from fnmatch import fnmatchcase
from typing import NamedTuple

# Each of these modules registers the kind of source that it opens.
from distrain.data.prepare import archive, hub_parquet, labeled_folder  # noqa: F401
from distrain.data.prepare.adopt_classes import adopt_classes
from distrain.data.prepare.image_folder import IMAGE_EXTENSIONS
from distrain.data.prepare.junk import is_junk
from distrain.data.prepare.labels import read_class_names
from distrain.data.prepare.shard_names import (
    COMPRESSED_EXTENSIONS,
    check_one_set,
    get_shard_extension,
    is_shard_name,
    list_names,
    select_shards,
)
from distrain.data.prepare.source import (
    OPENERS_BY_EXTENSION,
    ImageSource,
    OpenedSource,
    SourceOptions,
)
from distrain.data.storage.backend import DirectoryEntry
from distrain.data.storage.retry import RefusedError
from distrain.data.storage.store import Store
from distrain.errors import UserError


class _FoundFiles(NamedTuple):
    """What a URL means."""

    store: Store
    files: list[DirectoryEntry]
    """Archives or Parquet files; none: a folder of class folders."""
    notes: list[str]
    """What the user should know about the files."""


def open_source(
    url: str,
    *,
    labels_url: str | None = None,
    names_url: str | None = None,
    classes_url: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> OpenedSource:
    """Find out what a URL holds, and open it.

    Args:
        url: a folder of one folder of images per class, a .tar or .parquet file, a
            folder of those, or a pattern with `*` for some of them.
        labels_url: labels for an archive or a folder of images without labels: a list
            (one label per file in the order of names, or lines of file and label), or
            the devkit of ILSVRC-2012 (a .tar.gz).
        names_url: readable class names: a file with lines of class and name or with
            one name per label, or that devkit.
        classes_url: a data set whose classes the source gets, matched by name.
        image_column: image column of Parquet files whose metadata does not name it.
        label_column: label column of such files.

    Raises:
        UserError: the URL holds nothing to train on, an option is for another kind of
            source, or the data set at `classes_url` lacks a class.
        OSError: it cannot be read.
    """
    store, files, notes = _find_files(url)
    extension = get_shard_extension(files[0].name) if files else ""
    options = SourceOptions(labels_url, image_column, label_column)
    _check_options(options, extension, store)
    opened = OPENERS_BY_EXTENSION[extension](store, files, options)

    source = opened.source
    source.notes[:0] = notes
    # The file or pattern, as the user gave it; its folder may hold others.
    location = Store(url).redacted_url
    source.location = location
    if not source.blocks:
        _check_is_folder(store)
        _check_compressed(store)
        raise UserError(
            f"no images in {location}: it must hold one folder of images "
            f"per class, or shards{_describe_contents(source)}"
        )
    if names_url is not None:
        source.classes = read_class_names(source.classes, names_url)
    if classes_url is not None:
        adopt_classes(source, classes_url)
    if len(source.classes) < 2:
        # Why a folder is no class, say.
        reasons = f" ({'; '.join(source.notes)})" if source.notes else ""
        raise UserError(
            f"{location} holds one class, {source.classes[0]}{reasons}: "
            "training needs at least two (a validation set gets those of its training "
            "set by --classes-of)"
        )
    return opened


def _describe_contents(source: ImageSource) -> str:
    """Return in parentheses what a source without images holds instead."""
    if source.rejects:
        first = source.rejects[0]
        return f" (first rejected: {first.name}: {first.reason})"
    if source.notes:
        return f" ({'; '.join(source.notes)})"
    names = [name for name in source.store.list_names() if not is_junk(name)]
    return f" (found: {list_names(names)})" if names else ""


def _check_is_folder(store: Store) -> None:
    """Raise UserError if what was opened as a folder is a file."""
    if store.is_folder(""):
        return
    extension = store.url.rpartition(".")[2].lower()
    if extension in IMAGE_EXTENSIONS:
        kind = "an image: pass the folder that holds the folders of the classes"
    elif extension in COMPRESSED_EXTENSIONS:
        kind = "a compressed archive: unpack it to a folder or a plain .tar"
    else:
        kind = "neither a folder nor a .tar or .parquet file: pass one of these"
    raise UserError(f"{store.redacted_url} is {kind}")


def _check_compressed(store: Store) -> None:
    """Raise UserError if a folder without images or shards holds other archives."""
    names = [
        name
        for name in store.list_names()
        if name.rpartition(".")[2].lower() in COMPRESSED_EXTENSIONS
    ]
    if names:
        raise UserError(
            f"{store.redacted_url} holds compressed archives ({list_names(names)}): "
            "unpack them to a folder or plain .tar files"
        )


def _check_options(options: SourceOptions, extension: str, store: Store) -> None:
    """Raise UserError if an option would be ignored.

    Args:
        options: the options.
        extension: of the source's files; "": a folder of class folders.
        store: where the source is.
    """
    if options.labels_url is not None and extension == "parquet":
        raise UserError(
            "labels are for a folder or a .tar of images without labels, and "
            f"{store.redacted_url} holds Parquet files: leave them out"
        )
    has_column = options.image_column is not None or options.label_column is not None
    if has_column and extension != "parquet":
        raise UserError(
            "image_column and label_column are for Parquet files, and "
            f"{store.redacted_url} has none: leave them out"
        )


def _find_files(url: str) -> _FoundFiles:
    """Find the archives or Parquet files that a URL means. Raises UserError."""
    parent, _, last = url.rstrip("/").rpartition("/")
    if "*" in last or is_shard_name(last):
        store = Store(parent or ("/" if url.startswith("/") else "."))
        found = _find_files_in_folder(store, last)
        if found is not None:
            return found
        redacted_url = Store(url).redacted_url
        if "*" in last:
            raise UserError(
                f"no file matches {redacted_url}: a pattern is for .tar and "
                ".parquet files; pass a folder by its name"
            )
        if "*" in parent:
            raise UserError(
                f"nothing at {redacted_url}: a pattern is for the last part of a path; "
                "pass one folder by its name"
            )
        if not store.is_folder(last):
            raise UserError(f"nothing at {redacted_url}: check the path")

    # The URL is a folder, perhaps with a name such as photos.tar.
    store = Store(url)
    try:
        exists = store.exists()
    except ConnectionError:
        exists = False
    if not exists:
        # The HTTP client takes a host that does not answer for a missing file.
        if "://" in url:
            raise UserError(
                f"nothing at {store.redacted_url}, or its host does not answer: "
                "check the URL"
            )
        raise UserError(f"no folder at {store.redacted_url}: check the path")
    files, notes = select_shards(store.list_entries(), store.redacted_url)
    names = [file.name for file in files]
    notes += check_one_set(names, [], store.redacted_url, is_whole_folder=True)
    return _FoundFiles(store, files, notes)


def _find_files_in_folder(store: Store, pattern: str) -> _FoundFiles | None:
    """Find the files of a folder with a name, or matching a pattern with `*`.

    Returns:
        The files; none of them if a pattern means the files beside class folders; None
        if there is no such file.
    """
    is_pattern = "*" in pattern
    try:
        entries = store.list_entries()
    except RefusedError:
        # A store may give a file of a folder that it refuses to list.
        if is_pattern:
            raise
        entries = []
    names = [entry.name for entry in entries]
    if not is_pattern:
        # A name may contain brackets, which are special in a pattern only.
        files = [
            entry for entry in entries if entry.name == pattern and not entry.is_folder
        ]
        # Some HTTP servers do not list folders: ask for the file itself.
        if pattern not in names and store.exists(pattern):
            files = [DirectoryEntry(pattern, store.get_size(pattern), False)]
        return _FoundFiles(store, files, []) if files else None

    matches = [
        entry
        for entry in entries
        if fnmatchcase(entry.name, pattern) and not entry.is_folder
    ]
    if not matches:
        return None
    files, notes = select_shards(matches, store.redacted_url)
    chosen = [file.name for file in files]
    url = store.redacted_url
    notes += check_one_set(chosen, names, url, is_whole_folder=False)
    return _FoundFiles(store, files, notes)
