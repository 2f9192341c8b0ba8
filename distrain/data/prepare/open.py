"""Open a URL as a source: an image folder, archives, hub Parquet or WebDataset."""

from fnmatch import fnmatchcase

# Each of these modules registers the kind of source that it opens.
from distrain.data.prepare import archive, hub_parquet, image_folder  # noqa: F401
from distrain.data.prepare.image_folder import IMAGE_EXTENSIONS
from distrain.data.prepare.labels import read_class_names
from distrain.data.prepare.source import (
    OPENERS_BY_EXTENSION,
    OpenedSource,
    SourceOptions,
)
from distrain.data.storage.backend import DirectoryEntry
from distrain.data.storage.retry import RefusedError
from distrain.data.storage.store import Store
from distrain.errors import UserError

_ARCHIVE_EXTENSIONS = {"7z", "bz2", "gz", "rar", "tgz", "xz", "zip", "zst"}


def open_source(
    url: str,
    *,
    labels_url: str | None = None,
    names_url: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> OpenedSource:
    """Find out what a URL holds, and open it.

    Args:
        url: a folder of one folder of images per class, a .tar or .parquet file, a
            folder of those, or a pattern with `*` for some of them.
        labels_url: labels for an archive of images without labels: a list (one label
            per file in the order of names, or lines of file and label), or the devkit
            of ILSVRC-2012 (a .tar.gz).
        names_url: readable class names: a file with lines of class and name or with
            one name per label, or that devkit.
        image_column: image column of Parquet files whose metadata does not name it.
        label_column: label column of such files.

    Raises:
        UserError: the URL holds nothing to train on, or an option is for another kind
            of source.
        OSError: it cannot be read.
    """
    # Files of a kind without an opener are opened as the folder they lie in: a pattern
    # may match the files beside the class folders.
    store, files = _find_files(url)
    extension = _get_extension(files[0]) if files else ""
    if extension not in OPENERS_BY_EXTENSION:
        extension = ""
    options = SourceOptions(labels_url, image_column, label_column)
    _check_options(options, extension, store)
    opened = OPENERS_BY_EXTENSION[extension](store, files, options)

    source = opened.source
    if not source.blocks:
        _check_is_folder(store)
        example = ""
        if source.rejects:
            first = source.rejects[0]
            example = f" (first rejected: {first.name}: {first.reason})"
        raise UserError(
            f"no images in {store.redacted_url}: it must hold one folder of images "
            f"per class, or shards{example}"
        )
    if names_url is not None:
        source.classes = read_class_names(source.classes, names_url)
    if len(source.classes) < 2:
        raise UserError(
            f"{store.redacted_url} holds one class, {source.classes[0]}: training "
            "needs at least two"
        )
    return opened


def _check_is_folder(store: Store) -> None:
    """Raise UserError if what was opened as a folder is a file."""
    if store.is_folder(""):
        return
    extension = store.url.rpartition(".")[2].lower()
    if extension in IMAGE_EXTENSIONS:
        kind = "an image: pass the folder that holds the folders of the classes"
    elif extension in _ARCHIVE_EXTENSIONS:
        kind = "a compressed archive: unpack it to a folder or a plain .tar"
    else:
        kind = "neither a folder nor a .tar or .parquet file: pass one of these"
    raise UserError(f"{store.redacted_url} is {kind}")


def _check_options(options: SourceOptions, extension: str, store: Store) -> None:
    """Raise UserError if an option would be ignored.

    Args:
        options: the options.
        extension: of the source's files; "": a folder of class folders.
        store: where the source is.
    """
    if options.labels_url is not None and extension != "tar":
        is_parquet = extension == "parquet"
        kind = "holds Parquet files" if is_parquet else "is an image folder"
        raise UserError(
            f"labels are for a .tar of images without labels, and "
            f"{store.redacted_url} {kind}: leave them out"
        )
    has_column = options.image_column is not None or options.label_column is not None
    if has_column and extension != "parquet":
        raise UserError(
            "image_column and label_column are for Parquet files, and "
            f"{store.redacted_url} has none: leave them out"
        )


def _get_extension(file: DirectoryEntry) -> str:
    return file.name.rpartition(".")[2]


def _list_extensions() -> tuple[str, ...]:
    return tuple(f".{extension}" for extension in OPENERS_BY_EXTENSION if extension)


def _find_files(url: str) -> tuple[Store, list[DirectoryEntry]]:
    """Return the store of a URL and the archives or Parquet files that the URL means.

    No files mean a folder of class folders.
    """
    parent, _, last = url.rstrip("/").rpartition("/")
    files: list[DirectoryEntry] = []
    if "*" in last or last.endswith(_list_extensions()):
        store = Store(parent or ("/" if url.startswith("/") else "."))
        files = _match_files(store, last)
        if not files and not store.is_folder(last):
            redacted_url = Store(url).redacted_url
            if "*" in last:
                raise UserError(
                    f"no file matches {redacted_url}: a pattern is for .tar and "
                    ".parquet files; pass a folder by its name"
                )
            raise UserError(f"nothing at {redacted_url}: check the path")

    # The URL is a folder, perhaps with a name such as photos.tar.
    if not files:
        store = Store(url)
        try:
            exists = store.exists()
        except ConnectionError:
            exists = False
        if not exists:
            if "://" in url:
                raise UserError(
                    f"nothing at {store.redacted_url}, or its host does not answer: "
                    "check the URL"
                )
            raise UserError(f"no folder at {store.redacted_url}: check the path")
        files = _list_shards(store)

    _check_one_set(files, url, store)
    return store, files


def _match_files(store: Store, pattern: str) -> list[DirectoryEntry]:
    """Return the files of a folder with a name, or matching a pattern with `*`."""
    is_pattern = "*" in pattern
    try:
        entries = store.list_entries()
    except RefusedError:
        # A store may give a file of a folder that it refuses to list.
        if is_pattern:
            raise
        entries = []
    files = []
    for entry in entries:
        # A name may contain brackets, which are special in a pattern only.
        name = entry.name
        matches = fnmatchcase(name, pattern) if is_pattern else name == pattern
        if matches and not entry.is_folder:
            files.append(entry)
    # Some HTTP servers do not list folders: ask for the file itself.
    if not files and not is_pattern and store.exists(pattern):
        files = [DirectoryEntry(pattern, store.get_size(pattern), False)]
    return files


def _list_shards(store: Store) -> list[DirectoryEntry]:
    """Return the archives or Parquet files of a folder; of several kinds, the first."""
    entries = [entry for entry in store.list_entries() if not entry.is_folder]
    for extension in sorted(_list_extensions()):
        files = [entry for entry in entries if entry.name.endswith(extension)]
        if files:
            return files
    return []


def _check_one_set(files: list[DirectoryEntry], url: str, store: Store) -> None:
    """Raise UserError if files are of several kinds or of several splits."""
    if len({_get_extension(file) for file in files}) > 1:
        raise UserError(
            f"{Store(url).redacted_url} matches files of several kinds: take one kind, "
            "such as *.tar"
        )
    # The hub names its files like train-00000-of-00005.parquet.
    if len(files) < 2 or not all("-of-" in file.name for file in files):
        return
    names = [file.name.rpartition("/")[2] for file in files]
    splits = sorted({name.partition("-")[0] for name in names})
    if len(splits) > 1:
        raise UserError(
            f"{store.redacted_url} holds several splits ({', '.join(splits)}): take "
            f"one of them, such as '{store.redacted_url}/{splits[0]}-*'"
        )
