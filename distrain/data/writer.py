"""Writes shards: Parquet files in the Hugging Face hub's layout, row groups of some megabytes, the manifest last.

A row is `image: struct<bytes, path>`, `label: int64`, `height`, `width`: int32, `crc32c`: uint32 (of the bytes).
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from crc32c import crc32c

from distrain.data.manifest import MANIFEST, Group, Manifest, Shard
from distrain.data.stats import Statistics
from distrain.data.store import Store


class ShardWriter:
    """Writes rows to shards in the order they come; `finish` writes the manifest, last."""

    def __init__(
        self,
        store: Store,
        classes: Sequence[str],
        size: tuple[int, int] | None,
        *,
        encoding: Literal["jpeg", "raw"] = "jpeg",
        proved: bool = False,
        group_rows: int = 100,
        shard_groups: int = 100,
    ) -> None:
        """Size, encoding and proved: as in `Manifest`. 100 rows of a group are 3 to 10 MB of JPEG, one ranged read."""
        self._store, self._classes, self._size = store, tuple(classes), size
        self._encoding, self._proved = encoding, proved
        self._group_rows, self._shard_groups = group_rows, shard_groups
        self._rows: list[dict[str, Any]] = []
        self._groups: list[pa.Table] = []
        self._shards: list[Shard] = []
        self._schema = _schema(self._classes)

    def add(self, data: bytes, label: int, path: str, size: tuple[int, int] | None = None) -> None:
        """Add an image file; `path` says where it came from, `size` is needed where sizes differ (0, 0: not known)."""
        assert 0 <= label < len(self._classes), label
        height, width = size or self._size or (0, 0)
        self._rows.append(
            {
                "image": {"bytes": data, "path": path},
                "label": label,
                "height": height,
                "width": width,
                "crc32c": crc32c(data),
            }
        )
        if len(self._rows) == self._group_rows:
            self._end_group()

    def finish(self, statistics: Statistics) -> Manifest:
        """Write what is left and the manifest."""
        if self._rows:
            self._end_group()
        if self._groups:
            self._end_shard()
        shards = tuple(self._shards)
        manifest = Manifest(shards, self._classes, self._size, self._encoding, self._proved, statistics)
        self._store.write(MANIFEST, manifest.to_json().encode())
        return manifest

    def _end_group(self) -> None:
        self._groups.append(pa.Table.from_pylist(self._rows, self._schema))
        self._rows = []
        if len(self._groups) == self._shard_groups:
            self._end_shard()

    def _end_shard(self) -> None:
        sink = pa.BufferOutputStream()
        # JPEG does not compress, and dictionary and statistics would make reads four times slower.
        options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        with pq.ParquetWriter(sink, self._schema, **options) as writer:
            for table in self._groups:
                writer.write_table(table)
        self._groups = []
        data = sink.getvalue().to_pybytes()
        path = f"shard-{len(self._shards):05d}.parquet"
        self._store.write(path, data)
        self._shards.append(_describe(path, data))


def _schema(classes: tuple[str, ...]) -> pa.Schema:
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
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def _describe(path: str, data: bytes) -> Shard:
    metadata = pq.read_metadata(pa.BufferReader(data))
    groups = []
    for g in range(metadata.num_row_groups):
        row_group = metadata.row_group(g)
        columns = [row_group.column(c) for c in range(row_group.num_columns)]
        start = min(column.data_page_offset for column in columns)
        end = max(column.data_page_offset + column.total_compressed_size for column in columns)
        groups.append(Group(row_group.num_rows, start, end, crc32c(memoryview(data)[start:end])))
    footer = groups[-1].end
    footer_crc = crc32c(memoryview(data)[footer:])
    return Shard(path, len(data), hashlib.sha256(data).hexdigest(), footer, footer_crc, tuple(groups))
