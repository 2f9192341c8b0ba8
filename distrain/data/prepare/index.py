"""A manifest for images that others keep, in Parquet or plain tar, so that they train as they are, without a copy.

Every row is read and decoded whole, once: later a checksum shows that it still is what was decoded then.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from crc32c import crc32c

from distrain.data.decoding.image import BadImageError, decode, readable
from distrain.data.prepare.hub import GroupReader
from distrain.data.prepare.pack import PIXEL_LIMIT, write_rejects
from distrain.data.prepare.source import (
    PATIENCE,
    Block,
    FileReader,
    Progress,
    Reader,
    Refused,
    Sample,
    Source,
)
from distrain.data.prepare.workers import batches, rows_of, workers
from distrain.data.shards.manifest import (
    MANIFEST,
    Group,
    Layout,
    Manifest,
    RowIndex,
    Shard,
)
from distrain.data.shards.parquet import Columns, Piece, read_footer
from distrain.data.shards.stats import PixelMoments, Statistics
from distrain.data.shards.writer import GROUP_BYTES, GROUP_ROWS
from distrain.data.storage.store import Store
from distrain.errors import UserError


class Indexed(NamedTuple):
    """What an index found."""

    manifest: Manifest
    rejects: list[Refused]
    """What is no row of the set, and rows that do not decode."""


class _Row(NamedTuple):
    label: int
    height: int
    width: int
    crc32c: int
    start: int
    size: int
    bad: str | None


class _Found(NamedTuple):
    """A group of rows; None: it is damaged as a whole."""

    group: Group | None
    moments: PixelMoments
    rejects: list[Refused]


def index(
    source: Source,
    columns: Columns | None,
    to: str | None = None,
    *,
    processes: int = 1,
    pixel_limit: int = PIXEL_LIMIT,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Indexed:
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
    store = source.store if to is None else Store(to)
    _check(source, store)
    layout: Layout = "tar" if columns is None else "parquet"
    groups: dict[str, list[Group]] = {}
    moments, rejects, at = (
        PixelMoments(),
        list(source.refused),
        Progress(0, sum(b.rows for b in source.blocks), 0),
    )
    progress(at)
    with workers(processes, source.reader, source.store.url) as pool:
        tasks = (
            _runs(source.blocks)
            if columns is None
            else ([block] for block in source.blocks)
        )
        for blocks, found in pool.map(
            _of_tar if columns is None else _of_parquet,
            ((t, pixel_limit) for t in tasks),
        ):
            moments.merge(found.moments)
            rejects.extend(found.rejects)
            if found.group is not None:
                groups.setdefault(blocks[0][0].file, []).append(found.group)
            at = _moved(at, blocks[0])
            progress(at)
    write_rejects(store, rejects)
    if not moments.pixels:
        raise UserError(
            f"none of the {at.total} images in {source.store.name} could be decoded"
        )
    manifest = Manifest(
        shards=tuple(
            _shard(source.store, path, layout, tuple(found))
            for path, found in groups.items()
        ),
        classes=source.classes,
        size=None,
        encoding="jpeg",
        proved=True,
        statistics=moments.statistics(),
        layout=layout,
        image_column=columns.image if columns else "",
        at=None if to is None else source.store.local or source.store.url,
    )
    store.write(MANIFEST, manifest.to_json().encode(), patience=PATIENCE)
    return Indexed(manifest, rejects)


def _check(source: Source, store: Store) -> None:
    """See that there is something to index, and that the manifest can be written.

    Raises:
        UserError: the source is a folder of images, its URL has a secret in it, or a manifest is there.
    """
    if source.blocks[0].start is None:
        raise UserError(
            f"{source.store.name} is a folder of single files: pack it, so that one read brings many"
        )
    if store is not source.store and source.store.name != source.store.url:
        raise UserError(
            f"{source.store.name} is given with a secret, which a manifest would keep: give it without"
        )
    if store.exists(MANIFEST):
        raise UserError(
            f"{store.name} has a {MANIFEST} already: delete it to index again"
        )
    _probe(store)


def colours(
    source: Source,
    *,
    processes: int = 1,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> tuple[Statistics, list[Refused]]:
    """Colour statistics of the images of a source, read and decoded once; and which of them do not decode.

    Raises:
        UserError: none decodes.
        OSError: the source fails for longer than a minute.
    """
    moments, rejects, at = (
        PixelMoments(),
        list(source.refused),
        Progress(0, sum(b.rows for b in source.blocks), 0),
    )
    progress(at)
    with workers(processes, source.reader, source.store.url) as pool:
        for blocks, found in pool.map(
            _coloured, batches(source.blocks, lambda block: (block.rows, block.size))
        ):
            moments.merge(found.moments)
            rejects.extend(found.rejects)
            at = _moved(at, blocks)
            progress(at)
    if not moments.pixels:
        raise UserError(
            f"none of the {at.total} images in {source.store.name} could be decoded"
        )
    return moments.statistics(), rejects


def _coloured(reader: Reader, blocks: Sequence[Block]) -> _Found:
    moments, rejects = PixelMoments(), list[Refused]()
    for _, rows in rows_of(reader, blocks):
        for row in [rows] if isinstance(rows, Refused) else rows:
            try:
                if isinstance(row, Sample):
                    moments.add(decode(row.data, PIXEL_LIMIT))
                else:
                    rejects.append(row)
            except BadImageError as error:
                rejects.append(Refused(row.name, str(error)))
    return _Found(None, moments, rejects)


def _moved(at: Progress, blocks: Sequence[Block]) -> Progress:
    size = at.bytes + sum(block.size for block in blocks)
    return Progress(at.done + sum(block.rows for block in blocks), at.total, size)


def _probe(store: Store) -> None:
    """Fail now rather than after hours of reading."""
    try:
        store.write(".probe", b"")
        store.remove(".probe")
    except OSError as error:
        raise UserError(
            f"cannot write to {store.name} ({error}): choose a place for the manifest with --to"
        ) from None


def _shard(store: Store, path: str, layout: Layout, groups: tuple[Group, ...]) -> Shard:
    size, footer, checksum = store.size(path), 0, 0
    if layout == "parquet":
        footer, data = read_footer(store, path, size, PATIENCE)
        checksum = crc32c(data)
    return Shard(path, size, groups, None, footer, checksum, store.version(path))


def _runs(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    """Files that lie one after another in an archive, as many as one read should bring."""
    run = list[Block]()
    for block in sorted(blocks, key=lambda block: (block.file, block.start)):
        if run and (
            block.file != run[0].file
            or len(run) == GROUP_ROWS
            or _end(block) - (run[0].start or 0) > GROUP_BYTES
        ):
            yield run
            run = []
        run.append(block)
    if run:
        yield run


def _end(block: Block) -> int:
    assert block.start is not None
    return block.start + block.size


# --- in the processes


def _of_tar(reader: Reader, task: tuple[list[Block], int]) -> _Found:
    assert isinstance(reader, FileReader)
    blocks, limit = task
    first, end = blocks[0].start or 0, _end(blocks[-1])
    data = reader.range(blocks[0].file, first, end)
    moments, rejects, rows = PixelMoments(), list[Refused](), list[_Row]()
    for block in blocks:
        start = (block.start or 0) - first
        sample = Sample(block.name, block.label, data[start : start + block.size])
        rows.append(_row(sample, start, limit, moments, rejects))
    return _Found(_group(Piece(first, data), rows), moments, rejects)


def _of_parquet(reader: Reader, task: tuple[list[Block], int]) -> _Found:
    assert isinstance(reader, GroupReader)
    (block,), limit = task
    images, labels = (reader.piece(block, column) for column in reader.columns)
    moments, rejects, rows = PixelMoments(), list[Refused](), list[_Row]()
    found = reader.rows(block, [images, labels])
    if isinstance(found, Refused):
        return _Found(None, moments, [found])
    for one in found:
        if isinstance(one, Refused):
            rejects.append(one)
            rows.append(_Row(0, 0, 0, 0, 0, 0, one.reason))
        else:
            rows.append(_row(one, 0, limit, moments, rejects))
    return _Found(_group(images, rows, block.group), moments, rejects)


def _row(
    sample: Sample,
    start: int,
    limit: int,
    moments: PixelMoments,
    rejects: list[Refused],
) -> _Row:
    """What is to be known of an image; its pixels are added to the moments."""
    data = sample.data
    height = width = 0
    bad = None
    try:
        _, height, width = readable(np.frombuffer(data, np.uint8), limit)
        pixels = decode(data, limit)
        moments.add(pixels)
    except BadImageError as error:
        bad = str(error)
        rejects.append(Refused(sample.name, bad))
    return _Row(sample.label, height, width, crc32c(data), start, len(data), bad)


def _group(piece: Piece, rows: list[_Row], number: int = -1) -> Group:
    label, height, width, checksum, start, size = (
        np.array(column) for column in list(zip(*rows, strict=True))[:-1]
    )
    bad = {i: row.bad for i, row in enumerate(rows) if row.bad is not None}
    index = RowIndex(label, height, width, checksum, start, size, bad)
    return Group(
        len(rows),
        piece.start,
        piece.start + len(piece.data),
        crc32c(piece.data),
        index,
        number,
    )
