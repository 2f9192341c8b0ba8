"""Folders of images for tests of equal images, and the data sets made of them."""

from pathlib import Path

from distrain.data.prepare.duplicates import HashedSet
from distrain.data.shards.manifest import Manifest
from distrain.data.storage.store import Store


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def opened(url: str | Path) -> HashedSet:
    store = Store(str(url))
    return HashedSet(store, Manifest.load(store))
