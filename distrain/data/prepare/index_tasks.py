"""Index one row group, or measure some images: the work of `index` in its processes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from crc32c import crc32c

from distrain.data.decoding.bad_image import BadImageError
from distrain.data.decoding.image import decode_rgb, open_rgb, sanitize_file
from distrain.data.decoding.pixel_hash import NO_HASH, hash_rgbx, view_rgbx
from distrain.data.prepare.pack_options import DEFAULT_PIXEL_LIMIT
from distrain.data.prepare.process_pool import prefetch_blocks
from distrain.data.prepare.row_group_reader import RowGroupReader
from distrain.data.prepare.source import Block, BlockReader, FileReader, Reject, Sample
from distrain.data.shards.entries import RowGroup, RowIndex
from distrain.data.shards.parquet import ByteRange
from distrain.data.shards.stats import PixelMoments


class _IndexedRow(NamedTuple):
    label: int
    height: int
    width: int
    crc32c: int
    start: int
    size: int
    bad_reason: str | None
    pixel_hash: bytes = NO_HASH


@dataclass
class DecodedGroup:
    """Result of one task."""

    group: RowGroup | None = None
    """None: the row group is damaged as a whole, or only its colors are measured."""
    moments: PixelMoments = field(default_factory=PixelMoments)
    rejects: list[Reject] = field(default_factory=list)
    num_turned: int = 0
    """JPEGs that PIL decodes and turns upright whenever they are read."""


def get_block_end(block: Block) -> int:
    """Return the end of a block that is a byte range of a file."""
    assert block.start is not None
    return block.start + block.num_bytes


def measure_colors(reader: BlockReader, blocks: Sequence[Block]) -> DecodedGroup:
    """Decode the images of blocks for their color statistics alone."""
    decoded = DecodedGroup()
    for block, rows in prefetch_blocks(reader, blocks):
        if isinstance(rows, Reject):
            decoded.rejects.append(rows._replace(num_images=block.num_rows))
            continue
        for row in rows:
            if isinstance(row, Reject):
                decoded.rejects.append(row)
                continue
            try:
                decoded.moments.add_image(decode_rgb(row.data, DEFAULT_PIXEL_LIMIT))
            except BadImageError as error:
                decoded.rejects.append(Reject(row.name, str(error)))
    return decoded


def index_tar_blocks(
    reader: BlockReader, task: tuple[list[Block], int]
) -> DecodedGroup:
    """Index adjacent files of an archive as one row group, with a single read.

    Args:
        reader: a FileReader.
        task: the files and the pixel limit.
    """
    assert isinstance(reader, FileReader)
    blocks, pixel_limit = task
    group_start = blocks[0].start or 0
    group_end = get_block_end(blocks[-1])
    data = reader.read_range(blocks[0].path, group_start, group_end)

    decoded = DecodedGroup()
    rows: list[_IndexedRow] = []
    for block in blocks:
        # The start of a row counts from the first byte of its group.
        start = (block.start or 0) - group_start
        sample = Sample(block.name, block.label, data[start : start + block.num_bytes])
        rows.append(_index_row(sample, start, pixel_limit, decoded))
    decoded.group = _build_group(ByteRange(group_start, data), rows)
    return decoded


def index_row_group(reader: BlockReader, task: tuple[list[Block], int]) -> DecodedGroup:
    """Index a row group of a Parquet file.

    Args:
        reader: a RowGroupReader.
        task: a list of the one block, and the pixel limit.
    """
    assert isinstance(reader, RowGroupReader)
    (block,), pixel_limit = task
    images, labels = (reader.read_column(block, column) for column in reader.columns)
    samples = reader.parse_rows(block, [images, labels])
    if isinstance(samples, Reject):
        return DecodedGroup(rejects=[samples._replace(num_images=block.num_rows)])

    # A bad row keeps its place in the group, so that row numbers match the file.
    decoded = DecodedGroup()
    rows: list[_IndexedRow] = []
    for sample in samples:
        if isinstance(sample, Reject):
            decoded.rejects.append(sample)
            rows.append(_IndexedRow(0, 0, 0, 0, 0, 0, sample.reason))
        else:
            rows.append(_index_row(sample, 0, pixel_limit, decoded))
    # Training reads the image column alone; labels are in the index.
    decoded.group = _build_group(images, rows, block.row_group)
    return decoded


def _index_row(
    sample: Sample, start: int, pixel_limit: int, decoded: DecodedGroup
) -> _IndexedRow:
    """Return the index entry of an image, and add its pixels to the result's moments.

    An image that does not decode is added to the result's rejects.
    """
    data = sample.data
    height = 0
    width = 0
    bad_reason = None
    pixel_hash = NO_HASH
    try:
        # Decode the file that the training decoder gets: its size is the upright one.
        file = sanitize_file(np.frombuffer(data, np.uint8), pixel_limit)
        pixels = view_rgbx(open_rgb(file.data.tobytes(), pixel_limit))
        pixel_hash = hash_rgbx(pixels)
        decoded.moments.add_image(pixels)
        height = file.height
        width = file.width
        decoded.num_turned += file.was_turned
    except BadImageError as error:
        bad_reason = str(error)
        decoded.rejects.append(Reject(sample.name, bad_reason))
    checksum = crc32c(data)
    return _IndexedRow(
        sample.label, height, width, checksum, start, len(data), bad_reason, pixel_hash
    )


def _build_group(
    image_range: ByteRange, rows: list[_IndexedRow], row_group: int = -1
) -> RowGroup:
    # One array per field of the rows, except for the reasons and the hashes.
    label, height, width, checksum, start, size = (
        np.array(column) for column in list(zip(*rows, strict=True))[:-2]
    )
    bad = {
        i: row.bad_reason for i, row in enumerate(rows) if row.bad_reason is not None
    }
    index = RowIndex(label, height, width, checksum, start, size, bad)
    return RowGroup(
        len(rows),
        image_range.start,
        image_range.start + len(image_range.data),
        crc32c(image_range.data),
        index,
        row_group,
        b"".join(row.pixel_hash for row in rows),
    )
