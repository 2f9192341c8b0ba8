"""Looks at a data set: is every byte what the manifest says, does every image decode, what is in it."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from distrain.data.decoding.image import BadImageError, cut, decode
from distrain.data.prepare.source import PATIENCE, Progress
from distrain.data.shards.dataset import Dataset, Table, store_of, unpacked
from distrain.data.shards.manifest import Manifest, Shard
from distrain.data.shards.parquet import DamagedError, parse_footer
from distrain.data.storage.store import Store
from distrain.distributed.process import available_cores
from distrain.philox import Purpose, permutation

_PIXEL_LIMIT = 1 << 28
_TILE = 96


class Wrong(NamedTuple):
    """Something that is not as it should be."""

    where: str
    what: str


def verify(
    store: Store,
    manifest: Manifest,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> list[Wrong]:
    """Read everything once: sizes and SHA-256 of shards, CRC-32C of groups and rows, labels, each image whole.

    Args:
        store: where the manifest is.
        manifest: what the shards should hold.
        progress: called after every shard.
    """
    wrong: list[Wrong] = []
    store = store_of(manifest, store)
    with ThreadPoolExecutor(available_cores()) as pool:
        at = Progress(0, manifest.rows, 0)
        progress(at)
        for shard in manifest.shards:
            wrong.extend(_verify_shard(store, manifest, shard, pool))
            at = Progress(
                at.done + sum(group.rows for group in shard.groups),
                at.total,
                at.bytes + shard.bytes,
            )
            progress(at)
    return wrong


def _verify_shard(
    store: Store, manifest: Manifest, shard: Shard, pool: ThreadPoolExecutor
) -> Iterator[Wrong]:
    try:
        size = store.size(shard.path)
        if size != shard.bytes:
            yield Wrong(shard.path, f"has {size} bytes, not {shard.bytes}")
            return
        if (
            shard.sha256 is None
        ):  # of others: what was indexed of it is read, and nothing else
            read = partial(store.read, shard.path, patience=PATIENCE)
            yield from _verify_groups(read, manifest, shard, pool)
            return
        data = store.read(shard.path, patience=PATIENCE)
    except OSError as error:
        yield Wrong(
            shard.path,
            "is missing"
            if isinstance(error, FileNotFoundError)
            else f"cannot be read: {error}",
        )
        return
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        yield Wrong(shard.path, "has another SHA-256")
    yield from _verify_groups(lambda a, b: data[a:b], manifest, shard, pool)


def _verify_groups(
    read: Callable[[int, int], bytes],
    manifest: Manifest,
    shard: Shard,
    pool: ThreadPoolExecutor,
) -> Iterator[Wrong]:
    footer = None
    if shard.footer_start:
        data = read(shard.footer_start, shard.bytes)
        if crc32c(data) != shard.footer_crc32c:
            yield Wrong(
                shard.path, "has a damaged footer, so its rows cannot be looked at"
            )
            return
        footer = parse_footer(data)
    for number, group in enumerate(shard.groups):
        where, data = f"{shard.path} row group {number}", read(group.start, group.end)
        if crc32c(data) != group.crc32c:
            yield Wrong(where, "has another CRC-32C")
            continue
        try:
            table = unpacked(manifest, shard, number, data, footer, whole=True)
        except DamagedError as error:
            yield Wrong(where, str(error))
            continue
        if len(table.labels) != group.rows:
            yield Wrong(where, f"has {len(table.labels)} rows, not {group.rows}")
        known = group.index.bad if group.index is not None else {}
        rows = [i for i in range(len(table.labels)) if i not in known]
        for i, what in zip(
            rows, pool.map(partial(_verify_row, manifest, table), rows), strict=True
        ):
            if what:
                yield Wrong(
                    f"{where} row {i}"
                    + (f" ({table.names[i]})" if table.names else ""),
                    what,
                )


def _verify_row(manifest: Manifest, table: Table, i: int) -> str | None:
    data, label = bytes(table.data[table.starts[i] : table.ends[i]]), table.labels[i]
    if crc32c(data) != table.crc32c[i]:
        return "has another CRC-32C"
    if not 0 <= label < len(manifest.classes):
        return f"has label {label} of {len(manifest.classes)} classes"
    try:
        found = decode(data, _PIXEL_LIMIT).shape[:2]
    except BadImageError as error:
        return f"does not decode: {error}"
    wanted = manifest.size or table.sizes[i]
    return (
        None
        if found == wanted
        else f"is {found[1]} x {found[0]} pixels, not {wanted[1]} x {wanted[0]}"
    )


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
    for end, rows in zip(
        starts.tolist(), dataset.manifest.group_rows.tolist(), strict=True
    ):
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


def sheet(
    dataset: Dataset, columns: int = 8, rows: int = 8, seed: int = 0
) -> NDArray[np.uint8]:
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
