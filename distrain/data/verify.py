"""Looks at a data set: is every byte what the manifest says, does every image decode, what is in it."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from distrain.data.decode import BadImageError, cut, decode
from distrain.data.manifest import Manifest, Shard
from distrain.data.shards import Dataset, StoredRow, stored_rows
from distrain.data.store import Store
from distrain.philox import Purpose, permutation
from distrain.world import cores

_PIXEL_LIMIT = 1 << 28
_TILE = 96


class Wrong(NamedTuple):
    """Something that is not as it should be."""

    where: str
    what: str


def verify(
    store: Store, manifest: Manifest, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Wrong]:
    """Read everything once: sizes and SHA-256 of shards, CRC-32C of groups and rows, labels, each image whole.

    Args:
        store: where the shards are.
        manifest: what they should hold.
        progress: called with (shards done, shards in all).
    """
    wrong: list[Wrong] = []
    with ThreadPoolExecutor(cores()) as pool:
        for done, shard in enumerate(manifest.shards, 1):
            wrong.extend(_verify_shard(store, manifest, shard, pool))
            progress(done, len(manifest.shards))
    return wrong


def _verify_shard(store: Store, manifest: Manifest, shard: Shard, pool: ThreadPoolExecutor) -> Iterator[Wrong]:
    try:
        data = store.read(shard.path)
    except OSError as error:
        yield Wrong(shard.path, "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}")
        return
    if len(data) != shard.bytes:
        yield Wrong(shard.path, f"has {len(data)} bytes, not {shard.bytes}")
        return
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        yield Wrong(shard.path, "has another SHA-256")
    if crc32c(memoryview(data)[shard.footer_start :]) != shard.footer_crc32c:
        yield Wrong(shard.path, "has a damaged footer, so its rows cannot be looked at")
        return
    for number, group in enumerate(shard.groups):
        where = f"{shard.path} row group {number}"
        if crc32c(memoryview(data)[group.start : group.end]) != group.crc32c:
            yield Wrong(where, "has another CRC-32C")
            continue
        rows = stored_rows(data, number)
        if len(rows) != group.rows:
            yield Wrong(where, f"has {len(rows)} rows, not {group.rows}")
        for i, what in enumerate(pool.map(lambda row: _verify_row(manifest, row), rows)):
            if what:
                yield Wrong(f"{where} row {i} ({rows[i].path})", what)


def _verify_row(manifest: Manifest, row: StoredRow) -> str | None:
    if crc32c(row.data) != row.crc32c:
        return "has another CRC-32C"
    if not 0 <= row.label < len(manifest.classes):
        return f"has label {row.label} of {len(manifest.classes)} classes"
    try:
        found = decode(row.data, _PIXEL_LIMIT).shape[:2]
    except BadImageError as error:
        return f"does not decode: {error}"
    wanted = manifest.size or row.size
    return None if found == wanted else f"is {found[1]} x {found[0]} pixels, not {wanted[1]} x {wanted[0]}"


class Contents(NamedTuple):
    """What is in a data set."""

    classes: dict[str, int]
    """Rows of each class."""
    bytes: tuple[int, int, int]
    """Of an image file: least, median, most."""
    heights: tuple[int, int, int]
    widths: tuple[int, int, int]


def contents(dataset: Dataset) -> Contents:
    """Read every row once."""
    labels, sizes, lengths = Counter[int](), list[tuple[int, int]](), list[int]()
    starts = np.cumsum(dataset.manifest.group_rows)
    for end, rows in zip(starts.tolist(), dataset.manifest.group_rows.tolist(), strict=True):
        for row in dataset.rows(np.arange(end - rows, end)):
            labels[row.label] += 1
            sizes.append(row.size)
            lengths.append(len(row.data))
    height_width = np.array(sizes)
    return Contents(
        {name: labels[i] for i, name in enumerate(dataset.manifest.classes)},
        _spread(np.array(lengths)),
        _spread(height_width[:, 0]),
        _spread(height_width[:, 1]),
    )


def _spread(values: NDArray[np.int64]) -> tuple[int, int, int]:
    return int(values.min()), int(np.median(values)), int(values.max())


def sheet(dataset: Dataset, columns: int = 8, rows: int = 8, seed: int = 0) -> NDArray[np.uint8]:
    """A contact sheet of random samples, each cut to its centre square: RGB of shape (rows * 96, columns * 96, 3).

    A sample that does not decode is a red tile.
    """
    picked = permutation(dataset.manifest.rows, seed, Purpose.PACK)[: columns * rows]
    tiles = np.full((columns * rows, _TILE, _TILE, 3), 255, np.uint8)
    for tile, row in zip(tiles, dataset.rows(picked), strict=False):
        try:
            pixels = decode(bytes(row.data), _PIXEL_LIMIT)
        except BadImageError:
            tile[:] = (200, 0, 0)
            continue
        height_width = np.array(pixels.shape[:2], np.float64)
        side = height_width.min()
        tile[:] = cut(pixels, (height_width - side) / 2, np.array([side, side]), _TILE)
    grid = tiles.reshape(rows, columns, _TILE, _TILE, 3).swapaxes(1, 2)
    return grid.reshape(rows * _TILE, columns * _TILE, 3)
