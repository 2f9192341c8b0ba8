"""A folder of folders of images as a source."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from distrain.data.prepare.source import (
    MAX_FILE_BYTES,
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

_NUM_THREADS = 16
# Endings of what is an image, so that one beside the folders is refused by name; others are notes, lists, licences.
_IMAGE_EXTENSIONS = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"}


@register_opener("")
def open_image_folder(
    store: Store, files: Sequence[DirectoryEntry], options: SourceOptions
) -> OpenedSource:
    """A folder of one folder of images per class. Raises OSError."""
    classes, refused, blocks = list[str](), list[Reject](), list[Block]()
    for entry in store.list_entries():
        if entry.is_folder and not entry.name.startswith("."):
            classes.append(entry.name)
        elif entry.name.rpartition(".")[2].lower() in _IMAGE_EXTENSIONS:
            refused.append(Reject(entry.name, "an image beside the folders of classes"))
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for label, (name, entries) in enumerate(
            zip(classes, pool.map(store.list_entries, classes), strict=True)
        ):
            for entry in entries:
                path = f"{name}/{entry.name}"
                shown = path.encode(
                    "utf-8", "backslashreplace"
                ).decode()  # a name need not be text
                if entry.name.startswith("."):
                    continue
                if entry.is_folder or entry.is_special:
                    what = (
                        "a folder"
                        if entry.is_folder
                        else "a link to nowhere, or a device,"
                    )
                    refused.append(Reject(shown, f"{what} where an image should be"))
                elif (entry.size or 0) > MAX_FILE_BYTES:
                    refused.append(
                        Reject(
                            shown,
                            f"{entry.size} bytes are over the limit of {MAX_FILE_BYTES}",
                        )
                    )
                else:
                    blocks.append(Block(path, shown, label, None, entry.size or 0))
    return OpenedSource(
        ImageSource(
            store,
            "image folder",
            tuple(classes),
            blocks,
            FileReader(store.url),
            refused,
        ),
        None,
    )
