"""A folder of folders of images as a source."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from distrain.data.prepare.source import (
    FILE_LIMIT,
    Block,
    FileReader,
    Opened,
    Refused,
    Source,
    Wanted,
    opens,
)
from distrain.data.storage.backend import Entry
from distrain.data.storage.store import Store

_AT_ONCE = 16
# Endings of what is an image, so that one beside the folders is refused by name; others are notes, lists, licences.
_IMAGES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"}


@opens("")
def open_folder(store: Store, files: Sequence[Entry], wanted: Wanted) -> Opened:
    """A folder of one folder of images per class. Raises OSError."""
    classes, refused, blocks = list[str](), list[Refused](), list[Block]()
    for entry in store.entries():
        if entry.folder and not entry.name.startswith("."):
            classes.append(entry.name)
        elif entry.name.rpartition(".")[2].lower() in _IMAGES:
            refused.append(
                Refused(entry.name, "an image beside the folders of classes")
            )
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for label, (name, entries) in enumerate(
            zip(classes, pool.map(store.entries, classes), strict=True)
        ):
            for entry in entries:
                path = f"{name}/{entry.name}"
                shown = path.encode(
                    "utf-8", "backslashreplace"
                ).decode()  # a name need not be text
                if entry.name.startswith("."):
                    continue
                if entry.folder or entry.other:
                    what = (
                        "a folder"
                        if entry.folder
                        else "a link to nowhere, or a device,"
                    )
                    refused.append(Refused(shown, f"{what} where an image should be"))
                elif (entry.size or 0) > FILE_LIMIT:
                    refused.append(
                        Refused(
                            shown,
                            f"{entry.size} bytes are over the limit of {FILE_LIMIT}",
                        )
                    )
                else:
                    blocks.append(Block(path, shown, label, None, entry.size or 0))
    return Opened(
        Source(
            store,
            "image folder",
            tuple(classes),
            blocks,
            FileReader(store.url),
            refused,
        ),
        None,
    )
