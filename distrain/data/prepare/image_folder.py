"""Folder of one folder of images per class, as a source."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from distrain.data.prepare.junk import is_junk
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
# An image outside the class folders is rejected by name; any other file there is taken
# for a note, a list or a license and ignored.
IMAGE_EXTENSIONS = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"}


@register_opener("")
def open_image_folder(
    store: Store, files: Sequence[DirectoryEntry], options: SourceOptions
) -> OpenedSource:
    """Open a folder of one folder of images per class. Raises OSError."""
    classes: list[str] = []
    rejects: list[Reject] = []
    blocks: list[Block] = []

    # The top level: folders are classes, images there belong to none.
    for entry in store.list_entries():
        if entry.is_folder and not entry.name.startswith("."):
            classes.append(entry.name)
        elif entry.name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS:
            rejects.append(Reject(entry.name, "an image outside the class folders"))
        elif entry.is_special and not is_junk(entry.name):
            rejects.append(Reject(entry.name, f"{entry.problem}, not a class folder"))

    # The class folders, listed in threads: each listing of a bucket is a request.
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        listings = pool.map(store.list_entries, classes)
        for label, (name, entries) in enumerate(zip(classes, listings, strict=True)):
            for entry in entries:
                if is_junk(entry.name):
                    continue
                block = _check_entry(entry, f"{name}/{entry.name}", label)
                if isinstance(block, Reject):
                    rejects.append(block)
                else:
                    blocks.append(block)

    reader = FileReader(store.url)
    source = ImageSource(store, "image folder", tuple(classes), blocks, reader, rejects)
    return OpenedSource(source, None)


def _check_entry(entry: DirectoryEntry, path: str, label: int) -> Block | Reject:
    """Return the block of an entry of a class folder, or why it cannot be an image."""
    # A file name may be any bytes, and rejects are written as UTF-8.
    display_name = path.encode("utf-8", "backslashreplace").decode()
    if entry.is_folder:
        return Reject(display_name, "a folder where an image should be")
    if entry.is_special:
        reason = f"{entry.problem} where an image should be"
        return Reject(display_name, reason)
    size = entry.size or 0
    if size > MAX_FILE_BYTES:
        reason = f"{size} bytes are over the limit of {MAX_FILE_BYTES}"
        return Reject(display_name, reason)
    return Block(path, display_name, label, None, size)
