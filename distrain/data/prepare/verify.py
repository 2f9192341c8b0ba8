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

from distrain.data.decoding.image import BadImageError, crop_and_resize, decode_rgb
from distrain.data.prepare.source import RETRY_SECONDS, DatasetProgress
from distrain.data.shards.dataset import (
    Dataset,
    LoadedRowGroup,
    open_shard_store,
    parse_row_group,
)
from distrain.data.shards.manifest import Manifest, Shard
from distrain.data.shards.parquet import DamagedParquetError, parse_footer
from distrain.data.storage.store import Store
from distrain.distributed.process import count_available_cores
from distrain.philox import Purpose, draw_permutation

_MAX_PIXELS = 1 << 28
_TILE_SIDE = 96


class DatasetProblem(NamedTuple):
    """Something that is not as it should be."""

    location: str
    description: str


def verify_dataset(
    store: Store,
    manifest: Manifest,
    on_progress: Callable[[DatasetProgress], None] = lambda progress: None,
) -> list[DatasetProblem]:
    """Read everything once: sizes and SHA-256 of shards, CRC-32C of groups and rows, labels, each image whole.

    Args:
        store: where the manifest is.
        manifest: what the shards should hold.
        progress: called after every shard.
    """
    wrong: list[DatasetProblem] = []
    store = open_shard_store(manifest, store)
    with ThreadPoolExecutor(count_available_cores()) as pool:
        at = DatasetProgress(0, manifest.num_rows, 0)
        on_progress(at)
        for shard in manifest.shards:
            wrong.extend(_verify_shard(store, manifest, shard, pool))
            at = DatasetProgress(
                at.done + sum(group.rows for group in shard.groups),
                at.total,
                at.num_bytes + shard.bytes,
            )
            on_progress(at)
    return wrong


def _verify_shard(
    store: Store, manifest: Manifest, shard: Shard, pool: ThreadPoolExecutor
) -> Iterator[DatasetProblem]:
    try:
        size = store.get_size(shard.path)
        if size != shard.bytes:
            yield DatasetProblem(shard.path, f"has {size} bytes, not {shard.bytes}")
            return
        if (
            shard.sha256 is None
        ):  # of others: what was indexed of it is read, and nothing else
            read = partial(store.read, shard.path, retry_seconds=RETRY_SECONDS)
            yield from _verify_groups(read, manifest, shard, pool)
            return
        data = store.read(shard.path, retry_seconds=RETRY_SECONDS)
    except OSError as error:
        yield DatasetProblem(
            shard.path,
            "is missing"
            if isinstance(error, FileNotFoundError)
            else f"cannot be read: {error}",
        )
        return
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        yield DatasetProblem(shard.path, "has another SHA-256")
    yield from _verify_groups(lambda a, b: data[a:b], manifest, shard, pool)


def _verify_groups(
    read_range: Callable[[int, int], bytes],
    manifest: Manifest,
    shard: Shard,
    pool: ThreadPoolExecutor,
) -> Iterator[DatasetProblem]:
    footer = None
    if shard.footer_start:
        data = read_range(shard.footer_start, shard.bytes)
        if crc32c(data) != shard.footer_crc32c:
            yield DatasetProblem(
                shard.path, "has a damaged footer, so its rows cannot be looked at"
            )
            return
        footer = parse_footer(data)
    for number, group in enumerate(shard.groups):
        where, data = (
            f"{shard.path} row group {number}",
            read_range(group.start, group.end),
        )
        if crc32c(data) != group.crc32c:
            yield DatasetProblem(where, "has another CRC-32C")
            continue
        try:
            table = parse_row_group(
                manifest, shard, number, data, footer, include_metadata=True
            )
        except DamagedParquetError as error:
            yield DatasetProblem(where, str(error))
            continue
        if len(table.labels) != group.rows:
            yield DatasetProblem(
                where, f"has {len(table.labels)} rows, not {group.rows}"
            )
        known = group.index.bad if group.index is not None else {}
        rows = [i for i in range(len(table.labels)) if i not in known]
        for i, what in zip(
            rows, pool.map(partial(_verify_row, manifest, table), rows), strict=True
        ):
            if what:
                yield DatasetProblem(
                    f"{where} row {i}"
                    + (f" ({table.names[i]})" if table.names else ""),
                    what,
                )


def _verify_row(manifest: Manifest, table: LoadedRowGroup, row: int) -> str | None:
    data, label = (
        bytes(table.data[table.starts[row] : table.ends[row]]),
        table.labels[row],
    )
    if crc32c(data) != table.crc32c[row]:
        return "has another CRC-32C"
    if not 0 <= label < len(manifest.classes):
        return f"has label {label} of {len(manifest.classes)} classes"
    try:
        found = decode_rgb(data, _MAX_PIXELS).shape[:2]
    except BadImageError as error:
        return f"does not decode: {error}"
    wanted = manifest.image_size or table.image_sizes[row]
    return (
        None
        if found == wanted
        else f"is {found[1]} x {found[0]} pixels, not {wanted[1]} x {wanted[0]}"
    )


class DatasetSummary(NamedTuple):
    """What is in a data set."""

    rows_per_class: dict[str, int]
    """Rows of each class."""
    image_bytes: tuple[int, int, int]
    """Of an image file: least, median, most."""
    heights: tuple[int, int, int]
    widths: tuple[int, int, int]


def summarize_dataset(dataset: Dataset) -> DatasetSummary:
    """Read every row once."""
    labels, sizes, lengths = Counter[int](), list[tuple[int, int]](), list[int]()
    starts = np.cumsum(dataset.manifest.rows_per_group)
    for end, rows in zip(
        starts.tolist(), dataset.manifest.rows_per_group.tolist(), strict=True
    ):
        for row in dataset.read_rows(np.arange(end - rows, end)):
            labels[row.label] += 1
            sizes.append(row.image_size)
            lengths.append(len(row.data))
    height_width = np.array(sizes)
    return DatasetSummary(
        {name: labels[i] for i, name in enumerate(dataset.manifest.classes)},
        _find_min_median_max(np.array(lengths)),
        _find_min_median_max(height_width[:, 0]),
        _find_min_median_max(height_width[:, 1]),
    )


def _find_min_median_max(values: NDArray[np.int64]) -> tuple[int, int, int]:
    return int(values.min()), int(np.median(values)), int(values.max())


def draw_contact_sheet(
    dataset: Dataset, columns: int = 8, rows: int = 8, seed: int = 0
) -> NDArray[np.uint8]:
    """A contact sheet of random samples, each cut to its centre square: RGB of shape (rows * 96, columns * 96, 3).

    A sample that does not decode is a red tile.
    """
    picked = draw_permutation(dataset.manifest.num_rows, seed, Purpose.PACK)[
        : columns * rows
    ]
    tiles = np.full((columns * rows, _TILE_SIDE, _TILE_SIDE, 3), 255, np.uint8)
    for tile, row in zip(tiles, dataset.read_rows(picked), strict=False):
        try:
            pixels = decode_rgb(bytes(row.data), _MAX_PIXELS)
        except BadImageError:
            tile[:] = (200, 0, 0)
            continue
        height_width = np.array(pixels.shape[:2], np.float64)
        side = height_width.min()
        tile[:] = crop_and_resize(
            pixels, (height_width - side) / 2, np.array([side, side]), _TILE_SIDE
        )
    grid = tiles.reshape(rows, columns, _TILE_SIDE, _TILE_SIDE, 3).swapaxes(1, 2)
    return grid.reshape(rows * _TILE_SIDE, columns * _TILE_SIDE, 3)
