"""Finds out what a URL holds, an image folder, archives, hub Parquet or WebDataset, and opens it as a source."""

from fnmatch import fnmatchcase

from distrain.data.prepare import archive, hub_parquet, image_folder  # noqa: F401 - each registers what it opens
from distrain.data.prepare.labels import read_class_names
from distrain.data.prepare.source import (
    OPENERS_BY_EXTENSION,
    OpenedSource,
    SourceOptions,
)
from distrain.data.storage.backend import DirectoryEntry
from distrain.data.storage.store import Store
from distrain.errors import UserError


def open_source(
    url: str,
    *,
    labels_url: str | None = None,
    names_url: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> OpenedSource:
    """Look at a URL and open what is there.

    Args:
        url: a folder of folders, a .tar or .parquet file, a folder of those, or a pattern with `*` for some of them.
        labels: for an archive of images without labels, a list of them (a label for each file in the order of names, or
            lines of file and label) or the devkit of ILSVRC-2012 (a .tar.gz).
        names: names for people: a file with lines of class and name, or of a name for each label; or that devkit.
        image_column: of Parquet files, where their metadata leaves it open.
        label_column: the same.

    Raises:
        UserError: nothing to train on is there.
        OSError: it cannot be read.
    """
    store, files = _find_files(url)
    kind = files[0].name.rpartition(".")[2] if files else ""
    opener = OPENERS_BY_EXTENSION.get(
        kind, OPENERS_BY_EXTENSION[""]
    )  # a pattern may mean a folder by the files in it that are no archives
    opened = opener(store, files, SourceOptions(labels_url, image_column, label_column))
    source = opened.source
    if not source.blocks:
        first = (
            f" ({source.rejects[0].name}: {source.rejects[0].reason})"
            if source.rejects
            else ""
        )
        raise UserError(
            f"no images in {store.redacted_url}: it must hold one folder of images a class, or shards{first}"
        )
    if names_url is not None:
        source.classes = read_class_names(source.classes, names_url)
    if len(source.classes) < 2:
        raise UserError(
            f"{store.redacted_url} holds one class, {source.classes[0]}, so there is nothing to tell apart"
        )
    return opened


def _list_extensions() -> tuple[str, ...]:
    return tuple(f".{kind}" for kind in OPENERS_BY_EXTENSION if kind)


def _find_files(url: str) -> tuple[Store, list[DirectoryEntry]]:
    """The store of a URL, and the archives or Parquet files in it that it means; none: it is a folder of folders."""
    parent, _, last = url.rstrip("/").rpartition("/")
    if "*" in last or last.endswith(_list_extensions()):
        store = Store(parent or ("/" if url.startswith("/") else "."))
        meant = (
            (lambda name: fnmatchcase(name, last))
            if "*" in last
            else (lambda name: name == last)
        )
        files = [
            entry
            for entry in store.list_entries()
            if meant(entry.name) and not entry.is_folder
        ]
        if (
            not files and "*" not in last and store.exists(last)
        ):  # a server that lists nothing
            files = [DirectoryEntry(last, store.get_size(last), False)]
        if not files and not store.is_folder(last):
            raise UserError(f"nothing at {Store(url).redacted_url}: check the path")
    else:
        store, files = Store(url), []
    if not files:
        store = Store(url)
        if not store.exists():
            raise UserError(f"no folder at {store.redacted_url}: check the path")
        entries = [entry for entry in store.list_entries() if not entry.is_folder]
        for kind in sorted(_list_extensions()):  # of several in one folder, the first
            files = files or [entry for entry in entries if entry.name.endswith(kind)]
    if len({file.name.rpartition(".")[2] for file in files}) > 1:
        raise UserError(
            f"{Store(url).redacted_url} means files of several kinds: take one, such as *.tar"
        )
    splits = (
        {file.name.rpartition("/")[2].partition("-")[0] for file in files}
        if len(files) > 1
        else set()
    )
    if len(splits) > 1 and all("-of-" in file.name for file in files):
        some = sorted(splits)[0]
        raise UserError(
            f"{store.redacted_url} holds several splits ({', '.join(sorted(splits))}): take one of them, such as "
            f"'{store.redacted_url}/{some}-*'"
        )
    return store, files
