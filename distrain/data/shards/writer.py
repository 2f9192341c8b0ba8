"""Writes shards: Parquet files in the Hugging Face hub's layout, row groups of some megabytes.

A row is `image: struct<bytes, path>`, `label: int64`, `height`, `width`: int32, `crc32c`: uint32 (of the bytes).
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from crc32c import crc32c

from distrain.data.shards.manifest import RowGroup, Shard
from distrain.data.shards.parquet import parse_footer

MAX_GROUP_ROWS = 100
"""Rows of a row group, which is one ranged read of some megabytes."""
TARGET_GROUP_BYTES = 8 << 20


class ShardWriter:
    """Makes one shard in memory, of rows in the order they come."""

    def __init__(
        self, classes: Sequence[str], max_group_rows: int = MAX_GROUP_ROWS
    ) -> None:
        self._max_group_rows, self._schema = max_group_rows, _make_schema(classes)
        self._rows: list[dict[str, Any]] = []
        self._group_bytes = 0
        self._sink = pa.BufferOutputStream()
        # JPEG does not compress, and dictionary and statistics would make reads four times slower.
        options = {
            "compression": "none",
            "use_dictionary": False,
            "write_statistics": False,
        }
        self._writer = pq.ParquetWriter(self._sink, self._schema, **options)

    def add_row(
        self, data: bytes, label: int, path: str, size: tuple[int, int]
    ) -> None:
        """Add an image file; `path` says where it came from, `size` is its height and width in pixels."""
        row = {
            "label": label,
            "height": size[0],
            "width": size[1],
            "crc32c": crc32c(data),
        }
        self._rows.append({"image": {"bytes": data, "path": path}, **row})
        self._group_bytes += len(data)
        if (
            len(self._rows) == self._max_group_rows
            or self._group_bytes >= TARGET_GROUP_BYTES
        ):
            self._flush_group()

    def finish_shard(self, path: str) -> tuple[Shard, memoryview]:
        """The shard, as it is to be written to `path`."""
        self._flush_group()
        self._writer.close()
        data = memoryview(self._sink.getvalue())
        return _describe_shard(path, data), data

    def _flush_group(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))
            self._rows, self._group_bytes = [], 0


def _make_schema(classes: Sequence[str]) -> pa.Schema:
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(classes), "_type": "ClassLabel"},
        "height": {"dtype": "int32", "_type": "Value"},
        "width": {"dtype": "int32", "_type": "Value"},
        "crc32c": {"dtype": "uint32", "_type": "Value"},
    }
    fields = [
        pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        pa.field("label", pa.int64()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("crc32c", pa.uint32()),
    ]
    # The hub's own library reads the features from this key, and then shows images and named labels.
    return pa.schema(
        fields, metadata={"huggingface": json.dumps({"info": {"features": features}})}
    )


def _describe_shard(path: str, data: memoryview) -> Shard:
    length = int.from_bytes(data[-8:-4], "little") + 8
    footer = len(data) - length
    metadata, groups = parse_footer(bytes(data[footer:])), []
    for g in range(metadata.num_row_groups):
        row_group = metadata.row_group(g)
        columns = [row_group.column(c) for c in range(row_group.num_columns)]
        start = min(column.data_page_offset for column in columns)
        end = max(
            column.data_page_offset + column.total_compressed_size for column in columns
        )
        groups.append(RowGroup(row_group.num_rows, start, end, crc32c(data[start:end])))
    digest = hashlib.sha256(data).hexdigest()
    return Shard(path, len(data), tuple(groups), digest, footer, crc32c(data[footer:]))
