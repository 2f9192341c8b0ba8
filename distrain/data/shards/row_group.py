"""Parses a row group: the image files, labels and sizes of its rows."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrain.data.shards.entries import RowGroup, RowIndex, Shard
from distrain.data.shards.manifest import Manifest
from distrain.data.shards.parquet import (
    ByteRange,
    Footer,
    read_row_group,
    view_binary_column,
)

_ROW_COLUMNS = ["image.bytes", "label", "height", "width"]
_EXTRA_COLUMNS = ["crc32c", "image.path"]


class LoadedRowGroup(NamedTuple):
    """A row group in memory: row i's image file is data[starts[i]:ends[i]]."""

    data: NDArray[np.uint8]
    starts: list[int]
    ends: list[int]
    labels: list[int]
    image_sizes: list[tuple[int, int]]
    crc32c: list[int]
    """CRC-32C of each image file; may be empty if not asked for."""
    names: list[str]
    """Source of each image file; empty if not asked for or not known."""


def parse_row_group(
    manifest: Manifest,
    shard: Shard,
    group_index: int,
    data: bytes | memoryview,
    footer: Footer | None,
    *,
    include_metadata: bool,
) -> LoadedRowGroup:
    """Parse a row group from the bytes of its range in the shard.

    Args:
        manifest: manifest of the data set.
        shard: the shard that holds the group.
        group_index: the group's index in `shard.groups`. Its number in the file may be
            higher (`RowGroup.number`): `index` leaves out damaged row groups.
        data: the group's bytes, `start` to `end` of the shard.
        footer: footer of the shard, if that is Parquet.
        include_metadata: whether checksums and names are wanted.

    Raises:
        DamagedParquetError: the bytes are not a valid row group, even if their checksum
            is right.
    """
    group = shard.groups[group_index]
    if group.index is not None:
        return _parse_indexed_group(manifest, shard, group, group.index, data, footer)
    return _parse_packed_group(shard, group_index, data, footer, include_metadata)


def _parse_packed_group(
    shard: Shard,
    group_index: int,
    data: bytes | memoryview,
    footer: Footer | None,
    include_metadata: bool,
) -> LoadedRowGroup:
    """Parse a group that `pack` wrote: all of it is in the shard."""
    group = shard.groups[group_index]
    columns = list(_ROW_COLUMNS)
    if include_metadata:
        columns += _EXTRA_COLUMNS
    table = read_row_group(
        ranges=[ByteRange(group.start, data)],
        file_size=shard.bytes,
        footer=footer,
        row_group=group_index,
        columns=columns,
    )
    values, offsets = view_binary_column(table.column("image"))
    heights = table.column("height").to_pylist()
    widths = table.column("width").to_pylist()
    checksums = []
    names = []
    if include_metadata:
        checksums = table.column("crc32c").to_pylist()
        images = table.column("image").combine_chunks()
        names = images.field("path").to_pylist()
    return LoadedRowGroup(
        data=values,
        starts=offsets[:-1],
        ends=offsets[1:],
        labels=table.column("label").to_pylist(),
        image_sizes=list(zip(heights, widths, strict=True)),
        crc32c=checksums,
        names=names,
    )


def _parse_indexed_group(
    manifest: Manifest,
    shard: Shard,
    group: RowGroup,
    index: RowIndex,
    data: bytes | memoryview,
    footer: Footer | None,
) -> LoadedRowGroup:
    """Parse a group that others wrote: all but the image files is in the index."""
    if manifest.layout == "parquet":
        table = read_row_group(
            ranges=[ByteRange(group.start, data)],
            file_size=shard.bytes,
            footer=footer,
            row_group=group.number,
            columns=[manifest.image_column],
        )
        values, offsets = view_binary_column(table.column(0))
        starts = offsets[:-1]
        ends = offsets[1:]
    else:
        # In a tar, image files lie between headers, so the index has their positions.
        values = np.frombuffer(data, np.uint8)
        starts = index.start.tolist()
        ends = (index.start + index.size).tolist()
    heights = index.height.tolist()
    widths = index.width.tolist()
    return LoadedRowGroup(
        data=values,
        starts=starts,
        ends=ends,
        labels=index.label.tolist(),
        image_sizes=list(zip(heights, widths, strict=True)),
        crc32c=index.crc32c.tolist(),
        names=[],
    )
