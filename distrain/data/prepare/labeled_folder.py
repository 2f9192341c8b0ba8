"""Folders as a source: a folder of images per class, or images with a label list."""

from collections.abc import Sequence

from distrain.data.prepare.class_folders import has_image_name, note_other_files
from distrain.data.prepare.image_folder import (
    check_file,
    has_image_extension,
    list_files,
    open_image_folder,
    to_display_name,
)
from distrain.data.prepare.labeled_images import label_images
from distrain.data.prepare.source import (
    Block,
    FileReader,
    ImageSource,
    OpenedSource,
    Reject,
    SourceOptions,
    register_opener,
)
from distrain.data.storage.backend import DirectoryEntry
from distrain.data.storage.store import Store
from distrain.errors import UserError


@register_opener("")
def open_folder(
    store: Store, files: Sequence[DirectoryEntry], options: SourceOptions
) -> OpenedSource:
    """Open a folder of images.

    Raises:
        UserError: its folders are no classes, or the list does not fit the images.
        OSError: it cannot be read.
    """
    if options.labels_url is None:
        return OpenedSource(open_image_folder(store), None)
    return OpenedSource(_open_labeled_folder(store, options.labels_url), None)


def _open_labeled_folder(store: Store, labels_url: str) -> ImageSource:
    """Open a folder of images at any depth, whose labels are in a list alone.

    Raises UserError if its folders look like classes, or the list does not fit.
    """
    files, rejects = list_files(store)
    entry_by_path = dict(files)
    paths = [path for path in entry_by_path if has_image_extension(path)]
    # Without any extension of an image, each file may be one.
    if not paths:
        paths = [path for path in entry_by_path if has_image_name(path)]
    other_names: list[str] = []
    for path in sorted(entry_by_path.keys() - set(paths)):
        if has_image_name(path):
            rejects.append(Reject(to_display_name(path), "no image, by its extension"))
        else:
            other_names.append(to_display_name(path))
    paths.sort()
    # Class folders would be ignored.
    top_names = {path.partition("/")[0] for path in paths}
    if len(top_names) > 1 and all("/" in path for path in paths):
        raise UserError(
            "labels are for a folder or a .tar of images without labels, and "
            f"{store.redacted_url} is an image folder of classes: leave them out"
        )
    labeled = label_images(paths, labels_url, store.redacted_url)

    blocks: list[Block] = []
    for path in paths:
        if path in labeled.reason_by_name:
            reason = labeled.reason_by_name[path]
            rejects.append(Reject(to_display_name(path), reason))
            continue
        item = check_file(entry_by_path[path], path, labeled.label_by_name[path])
        if isinstance(item, Block):
            blocks.append(item)
        else:
            rejects.append(item)
    return ImageSource(
        store,
        "labeled folder",
        tuple(labeled.classes),
        blocks,
        FileReader(store.url),
        rejects,
        notes=[*labeled.notes, *note_other_files(other_names)],
    )
