"""A manifest for images that others keep, in Parquet or plain tar, so that they train as they are, without a copy.

Every row is read and decoded whole, once: later a checksum shows that it still is what was decoded then.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from crc32c import crc32c

from distrain.data.decoding.image import BadImageError, decode_rgb, sanitize_file
from distrain.data.prepare.hub_parquet import RowGroupReader
from distrain.data.prepare.pack import DEFAULT_PIXEL_LIMIT, write_rejects
from distrain.data.prepare.process_pool import (
    group_into_tasks,
    open_process_pool,
    prefetch_blocks,
)
from distrain.data.prepare.source import (
    RETRY_SECONDS,
    Block,
    BlockReader,
    DatasetProgress,
    FileReader,
    ImageSource,
    Reject,
    Sample,
)
from distrain.data.shards.manifest import (
    MANIFEST_FILE,
    Layout,
    Manifest,
    RowGroup,
    RowIndex,
    Shard,
)
from distrain.data.shards.parquet import ByteRange, ColumnNames, read_footer
from distrain.data.shards.stats import ColorStatistics, PixelMoments
from distrain.data.shards.writer import MAX_GROUP_ROWS, TARGET_GROUP_BYTES
from distrain.data.storage.store import Store
from distrain.errors import UserError


class IndexResult(NamedTuple):
    """What an index found."""

    manifest: Manifest
    rejects: list[Reject]
    """What is no row of the set, and rows that do not decode."""


class _IndexedRow(NamedTuple):
    label: int
    height: int
    width: int
    crc32c: int
    start: int
    size: int
    bad_reason: str | None


class _DecodedGroup(NamedTuple):
    """A group of rows; None: it is damaged as a whole."""

    group: RowGroup | None
    moments: PixelMoments
    rejects: list[Reject]


def index_dataset(
    source: ImageSource,
    columns: ColumnNames | None,
    manifest_url: str | None = None,
    *,
    num_processes: int = 1,
    pixel_limit: int = DEFAULT_PIXEL_LIMIT,
    on_progress: Callable[[DatasetProgress], None] = lambda progress: None,
) -> IndexResult:
    """Read every row once, and write a manifest of what is there.

    Args:
        source: Parquet or archives.
        columns: of the Parquet files.
        to: URL of a folder for the manifest; by default it lies beside the files.
        processes: how many decode at once.
        pixel_limit: pixels; an image that claims more is bad.
        progress: called after every group.

    Raises:
        UserError: the source is a folder of images, no image decodes, or a manifest is there.
        OSError: the source fails for longer than a minute, or the manifest cannot be written.
    """
    store = source.store if manifest_url is None else Store(manifest_url)
    _check_indexable(source, store)
    layout: Layout = "tar" if columns is None else "parquet"
    groups: dict[str, list[RowGroup]] = {}
    moments, rejects, at = (
        PixelMoments(),
        list(source.rejects),
        DatasetProgress(0, sum(b.num_rows for b in source.blocks), 0),
    )
    on_progress(at)
    with open_process_pool(num_processes, source.reader, source.store.url) as pool:
        tasks = (
            _group_adjacent_blocks(source.blocks)
            if columns is None
            else ([block] for block in source.blocks)
        )
        for blocks, found in pool.map_tasks(
            _index_tar_blocks if columns is None else _index_row_group,
            ((t, pixel_limit) for t in tasks),
        ):
            moments.merge_moments(found.moments)
            rejects.extend(found.rejects)
            if found.group is not None:
                groups.setdefault(blocks[0][0].path, []).append(found.group)
            at = _advance_progress(at, blocks[0])
            on_progress(at)
    write_rejects(store, rejects)
    if not moments.pixels:
        raise UserError(
            f"none of the {at.total} images in {source.store.redacted_url} could be decoded"
        )
    manifest = Manifest(
        shards=tuple(
            _build_shard(source.store, path, layout, tuple(found))
            for path, found in groups.items()
        ),
        classes=source.classes,
        image_size=None,
        encoding="jpeg",
        verified=True,
        statistics=moments.to_statistics(),
        layout=layout,
        image_column=columns.image if columns else "",
        shards_url=None
        if manifest_url is None
        else source.store.local_path or source.store.url,
    )
    store.write(MANIFEST_FILE, manifest.to_json().encode(), retry_seconds=RETRY_SECONDS)
    return IndexResult(manifest, rejects)


def _check_indexable(source: ImageSource, store: Store) -> None:
    """See that there is something to index, and that the manifest can be written.

    Raises:
        UserError: the source is a folder of images, its URL has a secret in it, or a manifest is there.
    """
    if source.blocks[0].start is None:
        raise UserError(
            f"{source.store.redacted_url} is a folder of single files: pack it, so that one read brings many"
        )
    if store is not source.store and source.store.redacted_url != source.store.url:
        raise UserError(
            f"{source.store.redacted_url} is given with a secret, which a manifest would keep: give it without"
        )
    if store.exists(MANIFEST_FILE):
        raise UserError(
            f"{store.redacted_url} has a {MANIFEST_FILE} already: delete it to index again"
        )
    _check_writable(store)


def compute_color_statistics(
    source: ImageSource,
    *,
    num_processes: int = 1,
    on_progress: Callable[[DatasetProgress], None] = lambda progress: None,
) -> tuple[ColorStatistics, list[Reject]]:
    """Colour statistics of the images of a source, read and decoded once; and which of them do not decode.

    Raises:
        UserError: none decodes.
        OSError: the source fails for longer than a minute.
    """
    moments, rejects, at = (
        PixelMoments(),
        list(source.rejects),
        DatasetProgress(0, sum(b.num_rows for b in source.blocks), 0),
    )
    on_progress(at)
    with open_process_pool(num_processes, source.reader, source.store.url) as pool:
        for blocks, found in pool.map_tasks(
            _measure_colors,
            group_into_tasks(
                source.blocks, lambda block: (block.num_rows, block.num_bytes)
            ),
        ):
            moments.merge_moments(found.moments)
            rejects.extend(found.rejects)
            at = _advance_progress(at, blocks)
            on_progress(at)
    if not moments.pixels:
        raise UserError(
            f"none of the {at.total} images in {source.store.redacted_url} could be decoded"
        )
    return moments.to_statistics(), rejects


def _measure_colors(reader: BlockReader, blocks: Sequence[Block]) -> _DecodedGroup:
    moments, rejects = PixelMoments(), list[Reject]()
    for _, rows in prefetch_blocks(reader, blocks):
        for row in [rows] if isinstance(rows, Reject) else rows:
            try:
                if isinstance(row, Sample):
                    moments.add_image(decode_rgb(row.data, DEFAULT_PIXEL_LIMIT))
                else:
                    rejects.append(row)
            except BadImageError as error:
                rejects.append(Reject(row.name, str(error)))
    return _DecodedGroup(None, moments, rejects)


def _advance_progress(
    progress: DatasetProgress, blocks: Sequence[Block]
) -> DatasetProgress:
    size = progress.num_bytes + sum(block.num_bytes for block in blocks)
    return DatasetProgress(
        progress.done + sum(block.num_rows for block in blocks), progress.total, size
    )


def _check_writable(store: Store) -> None:
    """Fail now rather than after hours of reading."""
    try:
        store.write(".probe", b"")
        store.remove(".probe")
    except OSError as error:
        raise UserError(
            f"cannot write to {store.redacted_url} ({error}): choose a place for the manifest with --to"
        ) from None


def _build_shard(
    store: Store, path: str, layout: Layout, groups: tuple[RowGroup, ...]
) -> Shard:
    size, footer, checksum = store.get_size(path), 0, 0
    if layout == "parquet":
        footer, data = read_footer(store, path, size, RETRY_SECONDS)
        checksum = crc32c(data)
    return Shard(path, size, groups, None, footer, checksum, store.get_etag(path))


def _group_adjacent_blocks(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    """Files that lie one after another in an archive, as many as one read should bring."""
    run = list[Block]()
    for block in sorted(blocks, key=lambda block: (block.path, block.start)):
        if run and (
            block.path != run[0].path
            or len(run) == MAX_GROUP_ROWS
            or _get_block_end(block) - (run[0].start or 0) > TARGET_GROUP_BYTES
        ):
            yield run
            run = []
        run.append(block)
    if run:
        yield run


def _get_block_end(block: Block) -> int:
    assert block.start is not None
    return block.start + block.num_bytes


# --- in the processes


def _index_tar_blocks(
    reader: BlockReader, task: tuple[list[Block], int]
) -> _DecodedGroup:
    assert isinstance(reader, FileReader)
    blocks, limit = task
    first, end = blocks[0].start or 0, _get_block_end(blocks[-1])
    data = reader.read_range(blocks[0].path, first, end)
    moments, rejects, rows = PixelMoments(), list[Reject](), list[_IndexedRow]()
    for block in blocks:
        start = (block.start or 0) - first
        sample = Sample(block.name, block.label, data[start : start + block.num_bytes])
        rows.append(_index_row(sample, start, limit, moments, rejects))
    return _DecodedGroup(_build_group(ByteRange(first, data), rows), moments, rejects)


def _index_row_group(
    reader: BlockReader, task: tuple[list[Block], int]
) -> _DecodedGroup:
    assert isinstance(reader, RowGroupReader)
    (block,), limit = task
    images, labels = (reader.read_column(block, column) for column in reader.columns)
    moments, rejects, rows = PixelMoments(), list[Reject](), list[_IndexedRow]()
    found = reader.parse_rows(block, [images, labels])
    if isinstance(found, Reject):
        return _DecodedGroup(None, moments, [found])
    for one in found:
        if isinstance(one, Reject):
            rejects.append(one)
            rows.append(_IndexedRow(0, 0, 0, 0, 0, 0, one.reason))
        else:
            rows.append(_index_row(one, 0, limit, moments, rejects))
    return _DecodedGroup(_build_group(images, rows, block.row_group), moments, rejects)


def _index_row(
    sample: Sample,
    start: int,
    pixel_limit: int,
    moments: PixelMoments,
    rejects: list[Reject],
) -> _IndexedRow:
    """What is to be known of an image; its pixels are added to the moments."""
    data = sample.data
    height = width = 0
    bad = None
    try:
        _, height, width = sanitize_file(np.frombuffer(data, np.uint8), pixel_limit)
        pixels = decode_rgb(data, pixel_limit)
        moments.add_image(pixels)
    except BadImageError as error:
        bad = str(error)
        rejects.append(Reject(sample.name, bad))
    return _IndexedRow(sample.label, height, width, crc32c(data), start, len(data), bad)


def _build_group(
    piece: ByteRange, rows: list[_IndexedRow], row_group: int = -1
) -> RowGroup:
    label, height, width, checksum, start, size = (
        np.array(column) for column in list(zip(*rows, strict=True))[:-1]
    )
    bad = {
        i: row.bad_reason for i, row in enumerate(rows) if row.bad_reason is not None
    }
    index = RowIndex(label, height, width, checksum, start, size, bad)
    return RowGroup(
        len(rows),
        piece.start,
        piece.start + len(piece.data),
        crc32c(piece.data),
        index,
        row_group,
    )
