"""Verify a data set against its manifest, and summarize what it holds."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from distrain.data.decoding.bad_image import BadImageError
from distrain.data.decoding.image import crop_and_resize, decode_rgb, open_rgb
from distrain.data.decoding.pixel_hash import describe_pixel_hash, hash_pixels
from distrain.data.prepare.decode_memory import count_decoding_threads
from distrain.data.prepare.duplicates import DuplicateReport
from distrain.data.prepare.source import RETRY_SECONDS, DatasetProgress
from distrain.data.shards.dataset import Dataset, open_shard_store
from distrain.data.shards.entries import HASH_BYTES, RowGroup, Shard
from distrain.data.shards.manifest import Manifest
from distrain.data.shards.parquet import Footer, parse_footer
from distrain.data.shards.parquet_pages import DamagedParquetError
from distrain.data.shards.row_group import LoadedRowGroup, parse_row_group
from distrain.data.storage.store import Store
from distrain.philox import Purpose, draw_permutation

# Above the default limit of pack and index: what they accepted must decode here.
_MAX_PIXELS = 1 << 28
_TILE_SIDE = 96
_BAD_TILE_COLOR = (200, 0, 0)


class DatasetProblem(NamedTuple):
    """Difference between a data set and its manifest, or an image that is bad."""

    location: str
    description: str


class VerifyResult(NamedTuple):
    """Result of verifying a data set."""

    manifest: Manifest
    """Manifest that the shards were compared with."""
    problems: list[DatasetProblem]
    num_images: int
    """Images that were checked: those whose row group could be read and parsed."""
    num_shards: int
    """Shards that these images are in."""
    num_unread_shards: int
    """Shards whose file could not be read, for instance for lack of permission."""
    duplicates: DuplicateReport | None = None
    """Equal images, in the data set and across it and another one."""


def verify_dataset(
    store: Store,
    manifest: Manifest,
    on_progress: Callable[[DatasetProgress], None] = lambda progress: None,
) -> VerifyResult:
    """Read everything once, decode every image, and return the problems.

    Checks the size and SHA-256 of shards, the CRC-32C of row groups and rows, labels,
    and image sizes.

    Args:
        store: where the manifest is.
        manifest: what the shards should hold.
        on_progress: called before the first and after every shard, with the images that
            were checked.
    """
    shard_store = open_shard_store(manifest, store)
    num_images = 0
    num_shards = 0
    verifier = _Verifier(shard_store, manifest)
    on_progress(DatasetProgress(0, manifest.num_rows, 0))
    for shard in manifest.shards:
        num_shard_images = verifier.verify_shard(shard)
        num_images += num_shard_images
        if num_shard_images:
            num_shards += 1
        on_progress(DatasetProgress(num_images, manifest.num_rows, verifier.bytes_read))
    return VerifyResult(
        manifest,
        verifier.problems,
        num_images,
        num_shards,
        verifier.num_unread_shards,
    )


class _Verifier:
    """Compares shards with the manifest; collects problems and counts bytes read."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self._store = store
        self._manifest = manifest
        self.problems: list[DatasetProblem] = []
        self.bytes_read = 0
        self.num_unread_shards = 0

    def verify_shard(self, shard: Shard) -> int:
        """Read a shard and compare it with the manifest.

        Returns:
            Number of images in the row groups that could be parsed.
        """
        num_images = 0
        try:
            size = self._store.get_size(shard.path)
            if size != shard.bytes:
                self._report(shard.path, f"has {size} bytes, not {shard.bytes}")
                return 0
            # An indexed file has no SHA-256, and perhaps other content between the
            # indexed ranges: read the ranges alone.
            if shard.sha256 is None:
                counts = self._verify_groups(shard, partial(self._read, shard.path))
            else:
                data = self._read(shard.path)
                if hashlib.sha256(data).hexdigest() != shard.sha256:
                    self._report(shard.path, "does not match its SHA-256")
                counts = self._verify_groups(shard, lambda start, end: data[start:end])
            # Group by group, so that those before a failed read count.
            for count in counts:
                num_images += count
        except FileNotFoundError:
            self._report(shard.path, "is missing")
        except OSError as error:
            self._report(shard.path, f"cannot be read: {error.strerror or error}")
            self.num_unread_shards += 1
        return num_images

    def _report(self, location: str, description: str) -> None:
        self.problems.append(DatasetProblem(location, description))

    def _read(
        self, path: str, start: int | None = None, end: int | None = None
    ) -> bytes:
        data = self._store.read(path, start, end, retry_seconds=RETRY_SECONDS)
        self.bytes_read += len(data)
        return data

    def _verify_groups(
        self, shard: Shard, read_range: Callable[[int, int], bytes]
    ) -> Iterator[int]:
        """Verify row group after row group; yield the number of images of each."""
        # Only Parquet files have a footer; without it, no row group can be parsed.
        footer = None
        if shard.footer_start:
            data = read_range(shard.footer_start, shard.bytes)
            if crc32c(data) != shard.footer_crc32c:
                description = "has a damaged footer, so its rows cannot be checked"
                self._report(shard.path, description)
                return
            try:
                footer = parse_footer(data)
            # The checksum fits: the file was damaged before it was packed or indexed.
            except DamagedParquetError as error:
                description = (
                    "has a footer that cannot be parsed, so its rows cannot be checked "
                    f"({error})"
                )
                self._report(shard.path, description)
                return
        for group_index, group in enumerate(shard.groups):
            data = read_range(group.start, group.end)
            yield self._verify_group(shard, group_index, data, footer)

    def _verify_group(
        self, shard: Shard, group_index: int, data: bytes, footer: Footer | None
    ) -> int:
        """Verify a row group; return its number of images, 0 if it is damaged."""
        # The row group as a whole: a damaged one is one problem, not one per row.
        location = shard.describe_group(group_index)
        group = shard.groups[group_index]
        if crc32c(data) != group.crc32c:
            self._report(location, "does not match its CRC-32C")
            return 0
        try:
            table = parse_row_group(
                self._manifest, shard, group_index, data, footer, include_metadata=True
            )
        except DamagedParquetError as error:
            self._report(location, str(error))
            return 0
        num_rows = len(table.labels)
        if num_rows != group.rows:
            self._report(location, f"has {num_rows} rows, not {group.rows}")

        # Each row, decoded in as many threads as memory allows, except for those that
        # index found to be bad.
        known_bad = group.index.bad if group.index is not None else {}
        rows = [i for i in range(num_rows) if i not in known_bad]
        find_problem = partial(_find_row_problem, self._manifest, table)
        hashes = self._get_pixel_hashes(group)
        row_hashes = [hashes.get(i) for i in rows]
        sizes = [self._manifest.image_size or table.image_sizes[i] for i in rows]
        max_pixels = max(
            (int(height) * int(width) for height, width in sizes), default=0
        )
        with ThreadPoolExecutor(count_decoding_threads(max_pixels)) as pool:
            problems = list(pool.map(find_problem, rows, row_hashes))
        for i, problem in zip(rows, problems, strict=True):
            if problem is not None:
                name = f" ({table.names[i]})" if table.names else ""
                self._report(f"{location} row {i}{name}", problem)
        return min(num_rows, group.rows)

    def _get_pixel_hashes(self, group: RowGroup) -> dict[int, bytes]:
        """Return the hash by row of pixels that must be the same here.

        Those of a packed image may be from before it was resized, and other versions of
        the codecs may decode other pixels.
        """
        hashes = group.pixel_hashes
        is_same = self._manifest.pixel_hash == describe_pixel_hash()
        if group.index is None or hashes is None or not is_same:
            return {}
        starts = range(0, len(hashes), HASH_BYTES)
        return {i: hashes[start : start + HASH_BYTES] for i, start in enumerate(starts)}


def _find_row_problem(
    manifest: Manifest, table: LoadedRowGroup, row: int, expected_hash: bytes | None
) -> str | None:
    data = bytes(table.data[table.starts[row] : table.ends[row]])
    label = table.labels[row]
    num_classes = len(manifest.classes)
    if crc32c(data) != table.crc32c[row]:
        return "does not match its CRC-32C"
    if not 0 <= label < num_classes:
        return f"has label {label}, but there are {num_classes} classes"
    try:
        image = open_rgb(data, _MAX_PIXELS, manifest.reading)
    except BadImageError as error:
        return f"does not decode: {error}"
    # The manifest has a size if all images have the same one.
    expected = manifest.image_size or table.image_sizes[row]
    if (image.height, image.width) != expected:
        return (
            f"is {image.width} x {image.height} pixels, "
            f"not {expected[1]} x {expected[0]}"
        )
    if expected_hash is not None and hash_pixels(image) != expected_hash:
        return "has other pixels than when it was indexed"
    return None


class DatasetSummary(NamedTuple):
    """Counts and sizes of the images of a data set."""

    manifest: Manifest
    """Manifest: classes, encoding, color statistics, fingerprint."""
    rows_per_class: dict[str, int]
    """Number of rows by class name."""
    image_bytes: tuple[int, int, int]
    """Minimum, median and maximum size of an image file."""
    heights: tuple[int, int, int]
    """Minimum, median and maximum in pixels."""
    widths: tuple[int, int, int]
    """Minimum, median and maximum in pixels."""
    duplicates: DuplicateReport | None = None
    """Equal images."""


def summarize_dataset(dataset: Dataset) -> DatasetSummary:
    """Read every row once, and count classes and sizes of those that are not bad."""
    rows_per_label = Counter[int]()
    image_sizes: list[tuple[int, int]] = []
    file_sizes: list[int] = []
    # One row group at a time: of all rows, only the sizes are kept.
    group_rows = dataset.manifest.rows_per_group
    group_ends = np.cumsum(group_rows)
    bad_samples = dataset.manifest.bad_samples
    for end, num_rows in zip(group_ends.tolist(), group_rows.tolist(), strict=True):
        ids = [i for i in range(end - num_rows, end) if i not in bad_samples]
        for row in dataset.read_rows(np.array(ids, np.int64)):
            rows_per_label[row.label] += 1
            image_sizes.append(row.image_size)
            file_sizes.append(len(row.data))

    # image_sizes: (rows, 2), height and width
    sizes = np.array(image_sizes)
    classes = dataset.manifest.classes
    return DatasetSummary(
        dataset.manifest,
        {name: rows_per_label[label] for label, name in enumerate(classes)},
        _find_min_median_max(np.array(file_sizes)),
        _find_min_median_max(sizes[:, 0]),
        _find_min_median_max(sizes[:, 1]),
    )


def _find_min_median_max(values: NDArray[np.int64]) -> tuple[int, int, int]:
    return int(values.min()), int(np.median(values)), int(values.max())


def draw_contact_sheet(
    dataset: Dataset, columns: int = 8, rows: int = 8, seed: int = 0
) -> NDArray[np.uint8]:
    """Draw a contact sheet of random samples, each cropped to its center square.

    A sample that does not decode is a red tile.

    Returns:
        RGB of shape (rows * 96, columns * 96, 3).
    """
    num_tiles = columns * rows
    order = draw_permutation(dataset.manifest.num_rows, seed, Purpose.PACK)
    samples = dataset.read_rows(order[:num_tiles])

    # White tiles are left if the data set has fewer samples than the sheet.
    tiles = np.full((num_tiles, _TILE_SIDE, _TILE_SIDE, 3), 255, np.uint8)
    for tile, sample in zip(tiles, samples, strict=False):
        try:
            pixels = decode_rgb(
                bytes(sample.data), _MAX_PIXELS, dataset.manifest.reading
            )
        except BadImageError:
            tile[:] = _BAD_TILE_COLOR
            continue
        size = np.array(pixels.shape[:2], np.float64)
        side = size.min()
        window_start = (size - side) / 2
        window_size = np.array([side, side])
        tile[:] = crop_and_resize(pixels, window_start, window_size, _TILE_SIDE)

    # tiles: (rows * columns, 96, 96, 3) -> sheet: (rows * 96, columns * 96, 3)
    grid = tiles.reshape(rows, columns, _TILE_SIDE, _TILE_SIDE, 3).swapaxes(1, 2)
    return grid.reshape(rows * _TILE_SIDE, columns * _TILE_SIDE, 3)
