"""Data sets for tests, written row by row."""

from collections.abc import Sequence

from distrain.data.shards.entries import Shard
from distrain.data.shards.manifest import MANIFEST_FILE, Manifest
from distrain.data.shards.stats import ColorStatistics
from distrain.data.shards.writer import MAX_GROUP_ROWS, ShardWriter
from distrain.data.storage.store import Store


class SetWriter:
    """Writes rows to shards in the order they come; `finish` writes the manifest, last. Not proved unless said."""

    def __init__(
        self,
        store: Store,
        classes: Sequence[str],
        size: tuple[int, int] | None,
        *,
        encoding: str = "jpeg",
        proved: bool = False,
        group_rows: int = MAX_GROUP_ROWS,
        shard_groups: int = 100,
    ) -> None:
        self._store, self._classes, self._size = store, tuple(classes), size
        self._encoding, self._proved = encoding, proved
        self._group_rows, self._shard_rows = group_rows, group_rows * shard_groups
        self._shards: list[Shard] = []
        self._rows = 0
        self._writer = ShardWriter(self._classes, group_rows)

    def add(
        self, data: bytes, label: int, path: str, size: tuple[int, int] | None = None
    ) -> None:
        self._writer.add_row(data, label, path, size or self._size or (0, 0))
        self._rows += 1
        if self._rows == self._shard_rows:
            self._end_shard()

    def finish(self, statistics: ColorStatistics) -> Manifest:
        if self._rows:
            self._end_shard()
        manifest = Manifest(
            tuple(self._shards),
            self._classes,
            self._size,
            self._encoding,
            self._proved,
            statistics,
        )
        self._store.write(MANIFEST_FILE, manifest.to_json().encode())
        return manifest

    def _end_shard(self) -> None:
        shard, data = self._writer.finish_shard(
            f"shard-{len(self._shards):05d}.parquet"
        )
        self._store.write(shard.path, data)
        self._shards.append(shard)
        self._rows, self._writer = 0, ShardWriter(self._classes, self._group_rows)
