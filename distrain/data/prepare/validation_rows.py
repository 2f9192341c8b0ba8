"""Which rows of a source are for validation, decided by their own bytes.

An image's file is hashed to a number from 0 up to 1; below the fraction, it is for
validation. So its side depends neither on other images nor on its name, and a larger
fraction keeps what a smaller one chose. Images of equal pixels follow the first of them
in the source's order, so that a duplicate never lies on both sides.
"""

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from distrain.data.decoding.bad_image import BadImageError
from distrain.data.decoding.image import open_rgb
from distrain.data.decoding.pixel_hash import hash_pixels
from distrain.data.prepare.process_pool import (
    group_into_tasks,
    open_process_pool,
    prefetch_blocks,
)
from distrain.data.prepare.source import (
    Block,
    BlockReader,
    DatasetProgress,
    ImageSource,
    Reject,
    Sample,
)
from distrain.data.shards.entries import HASH_BYTES

_NO_LABEL = -1


class RowHashes(NamedTuple):
    """Hashes of rows, in the order of a source."""

    labels: NDArray[np.int32]
    """-1: the row is no image that decodes, and its hashes are 0."""
    files: NDArray[np.uint64]
    """The first 8 bytes of each file's hash."""
    pixels: NDArray[np.uint8]
    """Hash of the upright pixels, shape (rows, 16)."""


class RowSides(NamedTuple):
    """Side of each row, in the order of a source."""

    labels: NDArray[np.int32]
    """-1: no image that decodes."""
    is_validation: NDArray[np.bool_]
    """False for what does not decode, which the training side rejects."""
    follows: NDArray[np.bool_]
    """Whether an earlier row has equal pixels."""


class SplitCounts(NamedTuple):
    """How a source was divided."""

    train: tuple[int, ...]
    """Images for training, by label."""
    val: tuple[int, ...]
    """Images for validation, by label."""
    num_followers: int
    """Images whose pixels equal those of an earlier one, whose side they share."""


def hash_source(
    source: ImageSource,
    pixel_limit: int,
    num_processes: int,
    on_progress: Callable[[DatasetProgress], None],
) -> RowHashes:
    """Read and decode all images of a source once, and return their hashes.

    Raises:
        RunError: a process was killed.
        OSError: the source fails for longer than a minute.
    """
    num_rows = sum(block.num_rows for block in source.blocks)
    progress = DatasetProgress(0, num_rows, 0, "hashing")
    on_progress(progress)
    groups = group_into_tasks(
        source.blocks, lambda block: (block.num_rows, block.num_bytes)
    )
    tasks = ((blocks, pixel_limit) for blocks in groups)
    parts: list[RowHashes] = []
    with open_process_pool(num_processes, source.reader, source.store.url) as pool:
        for (blocks, _), hashes in pool.map_tasks(_hash_blocks, tasks):
            parts.append(hashes)
            progress = progress._replace(
                done=progress.done + len(hashes.labels),
                num_bytes=progress.num_bytes + sum(block.num_bytes for block in blocks),
            )
            on_progress(progress)
    return RowHashes(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _hash_blocks(reader: BlockReader, task: tuple[list[Block], int]) -> RowHashes:
    """Hash the rows of some blocks: the work of a process.

    Args:
        reader: reader of the source.
        task: the blocks and the pixel limit.
    """
    blocks, pixel_limit = task
    num_rows = sum(block.num_rows for block in blocks)
    hashes = RowHashes(
        np.full(num_rows, _NO_LABEL, np.int32),
        np.zeros(num_rows, np.uint64),
        np.zeros((num_rows, HASH_BYTES), np.uint8),
    )
    start = 0
    for block, rows in prefetch_blocks(reader, blocks):
        # Of a block that cannot be read, no row is an image.
        if not isinstance(rows, Reject):
            for i, row in enumerate(rows, start):
                if isinstance(row, Sample):
                    _hash_sample(row, pixel_limit, hashes, i)
        start += block.num_rows
    return hashes


def _hash_sample(sample: Sample, pixel_limit: int, hashes: RowHashes, row: int) -> None:
    """Hash an image file into a row; one that does not decode leaves it as it is."""
    try:
        pixels = hash_pixels(open_rgb(sample.data, pixel_limit))
    except BadImageError:
        return
    hashes.labels[row] = sample.label
    file_hash = xxhash.xxh3_128_digest(sample.data)
    hashes.files[row] = int.from_bytes(file_hash[:8], "big")
    hashes.pixels[row] = np.frombuffer(pixels, np.uint8)


def choose_sides(hashes: RowHashes, fraction: float) -> RowSides:
    """Decide for each row whether it is for validation.

    Args:
        hashes: of the rows, in the order of the source.
        fraction: of the images that are for validation, in expectation.
    """
    # The first row of equal pixels, for each row that decodes.
    decoded = np.flatnonzero(hashes.labels != _NO_LABEL)
    pixels = np.ascontiguousarray(hashes.pixels[decoded]).view("V16").reshape(-1)
    _, first, group = np.unique(pixels, return_index=True, return_inverse=True)
    leaders = decoded[first[group.reshape(-1)]]

    # That one's file decides for all of them.
    is_validation = np.zeros(len(hashes.labels), np.bool_)
    is_validation[decoded] = hashes.files[leaders] / 2.0**64 < fraction
    follows = np.zeros(len(hashes.labels), np.bool_)
    follows[decoded] = leaders != decoded
    return RowSides(hashes.labels, is_validation, follows)


def count_sides(sides: RowSides, num_classes: int) -> SplitCounts:
    """Count the images of each class on both sides."""
    is_image = sides.labels != _NO_LABEL
    counts = [
        np.bincount(sides.labels[is_image & side], minlength=num_classes).tolist()
        for side in (~sides.is_validation, sides.is_validation)
    ]
    return SplitCounts(tuple(counts[0]), tuple(counts[1]), int(sides.follows.sum()))


def encode_sides(sides: RowSides) -> bytes:
    """Encode the sides of rows, to keep them in a file."""
    file = io.BytesIO()
    np.savez_compressed(file, **sides._asdict())
    return file.getvalue()


def decode_sides(data: bytes) -> RowSides:
    """Decode what `encode_sides` has encoded."""
    with np.load(io.BytesIO(data)) as arrays:
        return RowSides(**arrays)
