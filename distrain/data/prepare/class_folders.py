"""Names of class folders: which hold images, and which are not the classes at all."""

from collections.abc import Sequence

from distrain.data.prepare.class_numbers import note_lookalikes
from distrain.data.prepare.shard_names import is_shard_name, list_names, strip_copy_mark
from distrain.data.prepare.splits import (
    find_split,
    find_split_folders,
    is_split_folder,
)
from distrain.data.storage.store import Store
from distrain.data.storage.url import join_url
from distrain.errors import UserError

# Files that are certainly no images. A folder of nothing else is no class; beside
# images, such a file is passed over.
_OTHER_EXTENSIONS = {
    *("txt", "md", "rst", "csv", "tsv", "json", "jsonl", "xml", "yaml", "yml", "html"),
    *("pdf", "doc", "docx", "xls", "xlsx", "log", "ini", "cfg", "toml", "lst", "list"),
    *("py", "pyc", "ipynb", "sh", "m", "mat", "npy", "npz", "pkl", "pt", "pth"),
    *("zip", "tar", "gz", "tgz", "bz2", "xz", "zst", "7z", "rar"),
    *("parquet", "pq", "parq", "arrow", "tfrecord", "h5", "hdf5", "mdb", "db"),
    *("mp4", "avi", "mov", "mp3", "wav", "url", "lnk"),
}


def has_image_name(path: str) -> bool:
    """Return whether a file may be an image by its name."""
    return _get_extension(path) not in _OTHER_EXTENSIONS


def note_other_files(names: Sequence[str]) -> list[str]:
    """Return a sentence for files beside images that are none by their names."""
    names_by_extension: dict[str, list[str]] = {}
    for name in sorted(names):
        names_by_extension.setdefault(_get_extension(name), []).append(name)
    if not names_by_extension:
        return []
    kinds = ", ".join(
        f"{len(found):,} .{extension} ({found[0]})"
        for extension, found in names_by_extension.items()
    )
    return [f"passed over files that are no images by their names: {kinds}"]


def _get_extension(path: str) -> str:
    return path.rpartition(".")[2].lower()


def check_is_class_root(
    store: Store, class_names: Sequence[str], paths: Sequence[str]
) -> None:
    """Check that the folders of the first level are classes.

    Args:
        store: folder of these folders.
        class_names: folders of the first level that hold images.
        paths: all files below the first level, those of other folders included.

    Raises:
        UserError: they are splits, or hold splits, shards or the classes' folders.
    """
    url = store.redacted_url
    # Folders of Parquet or tar files, such as data/train/0000.parquet.
    shard_folders = sorted({_get_folder(path) for path in paths if is_shard_name(path)})
    if shard_folders and len(class_names) < 2:
        _check_no_partitions(url, shard_folders)
        choice = "" if len(shard_folders) == 1 else "one of them, such as "
        raise UserError(
            f"{url} holds its .parquet or .tar files in folders "
            f"({list_names(shard_folders)}): pass {choice}"
            f"{join_url(url, shard_folders[0])}"
        )

    # Splits, each of which holds the folders of the classes.
    splits = find_split_folders(class_names, paths)
    if splits:
        raise UserError(
            f"{url} holds several splits ({', '.join(splits)}): pass each one by "
            f"itself, such as {join_url(url, splits[0])}"
        )

    # One folder around the folders of the classes, as archives often have it.
    images = [path for path in paths if has_image_name(path)]
    inner_names = {path.split("/")[1] for path in images if path.count("/") > 1}
    is_flat = any(path.count("/") == 1 for path in images)
    if len(class_names) == 1 and len(inner_names) > 1 and not is_flat:
        raise UserError(
            f"{url} holds one class, {class_names[0]}, which holds "
            f"{len(inner_names):,} folders of images: if they are the classes, pass "
            f"{join_url(url, class_names[0])}"
        )

    # Splits within each class, such as bottle/train and bottle/test.
    check_inner_splits(url, images)


def _check_no_partitions(url: str, folders: Sequence[str]) -> None:
    """Raise UserError if folders are named `label=cat`, as Spark and pandas do."""
    partitions = [folder.rpartition("/")[2].partition("=") for folder in folders]
    columns = {column for column, mark, _ in partitions if mark}
    # Of folders such as split=train, one is to be passed.
    is_split = any(is_split_folder(value) for _, _, value in partitions)
    if len(columns) == 1 and len(folders) > 1 and not is_split:
        column = columns.pop()
        raise UserError(
            f"{url} is partitioned by the column {column} ({list_names(folders)}), "
            "which its files lack: write them again without partitions"
        )


def check_inner_splits(url: str, images: Sequence[str]) -> None:
    """Check that class folders do not hold folders of several splits.

    Args:
        url: where the class folders are, for messages.
        images: paths of images from the class folders on.

    Raises:
        UserError: they do.
    """
    splits_by_class: dict[str, dict[tuple[str, ...], str]] = {}
    for path in images:
        class_name, folder, *rest = path.split("/")
        split = find_split(f"{folder}.") if rest and is_split_folder(folder) else None
        if split is not None:
            splits = splits_by_class.setdefault(class_name, {})
            splits.setdefault(split.key, f"{class_name}/{folder}")
    for splits in splits_by_class.values():
        if len(splits) > 1:
            raise UserError(
                f"{url} holds several splits in its class folders "
                f"({list_names(sorted(splits.values()))}): put the folders of each "
                "split into a folder of its own"
            )


def note_similar_classes(class_names: Sequence[str]) -> list[str]:
    """Return a note for each class that may be a copy of another, or its spelling."""
    names = set(class_names)
    notes: list[str] = []
    for name in class_names:
        original = strip_copy_mark(name)
        if original in names:
            notes.append(
                f"the class {name!r} looks like a copy of the class {original!r}: "
                "if it is one, delete it"
            )
    return notes + note_lookalikes(class_names)


def _get_folder(path: str) -> str:
    return path.rpartition("/")[0]
