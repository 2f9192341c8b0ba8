"""Writes shards: Parquet files in the Hugging Face hub's layout.

Row groups have some megabytes. A row is `image: struct<bytes, path>`, `label: int64`,
`height`, `width`: int32, `crc32c`: uint32 (of the bytes).
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from crc32c import crc32c

from distrain.data.shards.entries import RowGroup, Shard
from distrain.data.shards.parquet import parse_footer

MAX_GROUP_ROWS = 100
"""Maximum rows of a row group, which is one ranged read of some megabytes."""
TARGET_GROUP_BYTES = 8 << 20
"""Bytes of image files after which a row group ends."""


class ShardWriter:
    """One shard, written in memory, with rows in the order they are added."""

    def __init__(
        self, classes: Sequence[str], max_group_rows: int = MAX_GROUP_ROWS
    ) -> None:
        self._max_group_rows = max_group_rows
        self._schema = _make_schema(classes)
        # Rows of the row group that is not written yet, and bytes of their image files.
        self._rows: list[dict[str, Any]] = []
        self._group_hashes: list[bytes] = []
        self._group_bytes = 0
        # Hashes of the pixels of each row group that is written.
        self._hashes: list[bytes | None] = []
        self._sink = pa.BufferOutputStream()
        # JPEG does not compress, and dictionary and statistics would make reads four
        # times slower.
        self._writer = pq.ParquetWriter(
            self._sink,
            self._schema,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
        )

    def add_row(
        self,
        data: bytes,
        label: int,
        path: str,
        size: tuple[int, int],
        pixel_hash: bytes | None = None,
    ) -> None:
        """Add an image file.

        Args:
            data: content of the file.
            label: index of its class.
            path: source of the file.
            size: height and width in pixels.
            pixel_hash: hash of its pixels; either all files of a shard have one, or
                none.
        """
        height, width = size
        self._rows.append(
            {
                "image": {"bytes": data, "path": path},
                "label": label,
                "height": height,
                "width": width,
                "crc32c": crc32c(data),
            }
        )
        if pixel_hash is not None:
            self._group_hashes.append(pixel_hash)
        self._group_bytes += len(data)
        is_full = len(self._rows) == self._max_group_rows
        if is_full or self._group_bytes >= TARGET_GROUP_BYTES:
            self._flush_group()

    def finish_shard(self, path: str) -> tuple[Shard, memoryview]:
        """Return the manifest's entry and the bytes of the shard.

        Args:
            path: where the shard is to be written, relative to the data set.
        """
        self._flush_group()
        self._writer.close()
        data = memoryview(self._sink.getvalue())
        return _describe_shard(path, data, self._hashes), data

    def _flush_group(self) -> None:
        if self._rows:
            table = pa.Table.from_pylist(self._rows, self._schema)
            self._writer.write_table(table)
            hashes = self._group_hashes
            assert len(hashes) in (0, len(self._rows))
            self._hashes.append(b"".join(hashes) if hashes else None)
            self._rows = []
            self._group_hashes = []
            self._group_bytes = 0


def _make_schema(classes: Sequence[str]) -> pa.Schema:
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(classes), "_type": "ClassLabel"},
        "height": {"dtype": "int32", "_type": "Value"},
        "width": {"dtype": "int32", "_type": "Value"},
        "crc32c": {"dtype": "uint32", "_type": "Value"},
    }
    image_fields = [
        pa.field("bytes", pa.binary()),
        pa.field("path", pa.string()),
    ]
    fields = [
        pa.field("image", pa.struct(image_fields)),
        pa.field("label", pa.int64()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("crc32c", pa.uint32()),
    ]
    # The Hugging Face library reads the features from this key, and then shows images
    # and named labels.
    info = {"info": {"features": features}}
    return pa.schema(fields, metadata={"huggingface": json.dumps(info)})


def _describe_shard(
    path: str, data: memoryview, hashes: Sequence[bytes | None]
) -> Shard:
    """Build the manifest's entry: byte ranges and checksums of the row groups."""
    # A Parquet file ends with its footer, the footer's length, and a magic number.
    footer_length = int.from_bytes(data[-8:-4], "little") + 8
    footer_start = len(data) - footer_length
    footer = data[footer_start:]
    metadata = parse_footer(bytes(footer))

    groups = []
    for g in range(metadata.num_row_groups):
        row_group = metadata.row_group(g)
        columns = [row_group.column(c) for c in range(row_group.num_columns)]
        # The data page is the first of a column here: there is no dictionary page.
        start = min(column.data_page_offset for column in columns)
        end = max(
            column.data_page_offset + column.total_compressed_size for column in columns
        )
        checksum = crc32c(data[start:end])
        groups.append(
            RowGroup(row_group.num_rows, start, end, checksum, pixel_hashes=hashes[g])
        )
    return Shard(
        path=path,
        bytes=len(data),
        groups=tuple(groups),
        sha256=hashlib.sha256(data).hexdigest(),
        footer_start=footer_start,
        footer_crc32c=crc32c(footer),
    )
