"""Index existing Parquet or tar files, so that they can be trained on without a copy.

Every row is read and decoded as a whole, once. Later its checksum shows that it is
still the one that was decoded then.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from crc32c import crc32c

from distrain.data.decoding.pixel_hash import describe_pixel_hash
from distrain.data.prepare.index_tasks import (
    get_block_end,
    index_row_group,
    index_tar_blocks,
    measure_colors,
)
from distrain.data.prepare.pack_options import DEFAULT_PIXEL_LIMIT
from distrain.data.prepare.plan import (
    encode_plan,
    find_finished,
    write_finished_plan,
)
from distrain.data.prepare.process_pool import group_into_tasks, open_process_pool
from distrain.data.prepare.rejects import (
    REJECTS_FILE,
    describe_main_reason,
    read_rejects,
    write_rejects,
)
from distrain.data.prepare.source import (
    RETRY_SECONDS,
    Block,
    DatasetProgress,
    ImageSource,
    Reject,
)
from distrain.data.shards.entries import RowGroup, Shard
from distrain.data.shards.manifest import MANIFEST_FILE, Layout, Manifest
from distrain.data.shards.parquet import ColumnNames, read_footer
from distrain.data.shards.stats import ColorStatistics, PixelMoments
from distrain.data.shards.writer import MAX_GROUP_ROWS, TARGET_GROUP_BYTES
from distrain.data.storage.store import Store
from distrain.errors import UserError

_PROBE_FILE = ".probe"


class IndexResult(NamedTuple):
    """Result of indexing."""

    manifest: Manifest
    rejects: list[Reject]
    """Everything that is not a row of the data set, and rows that do not decode."""
    manifest_url: str
    """URL or path of the manifest's folder: what a config names as its data set."""
    num_turned: int = 0
    """JPEGs that PIL decodes and turns upright whenever they are read."""
    was_complete: bool = False
    """True if the same files had been indexed before: nothing was read."""


class _IndexedBlocks(NamedTuple):
    """Result of indexing all blocks."""

    groups: dict[str, list[RowGroup]]
    """Row groups by file."""
    moments: PixelMoments
    rejects: list[Reject]
    num_turned: int


def index_dataset(
    source: ImageSource,
    columns: ColumnNames | None,
    manifest_url: str | None = None,
    *,
    num_processes: int = 1,
    pixel_limit: int = DEFAULT_PIXEL_LIMIT,
    on_progress: Callable[[DatasetProgress], None] = lambda progress: None,
) -> IndexResult:
    """Read and decode every row once, and write a manifest of the rows.

    Args:
        source: Parquet files or archives.
        columns: columns of the Parquet files; None: archives.
        manifest_url: URL of a folder for the manifest; by default it is written beside
            the files.
        num_processes: number of decoding processes.
        pixel_limit: an image that claims more pixels is bad.
        on_progress: called before the first image and after every row group.

    Raises:
        UserError: the source is a folder of images, its URL contains a secret that the
            manifest would store, the target cannot be written to, a manifest of other
            files or options exists already, or no image decodes.
        RunError: a process was killed.
        OSError: the source, or later the target, fails for longer than a minute.
    """
    store = source.store if manifest_url is None else Store(manifest_url)
    _check_indexable(source, store)

    # Look for the same index, which an earlier call may have finished.
    plan = encode_plan(source, {"columns": columns, "pixel_limit": pixel_limit})
    finished = find_finished(store, plan)
    if finished is not None:
        num_rows = _count_rows(source.blocks)
        on_progress(DatasetProgress(num_rows, num_rows, 0))
        rejects = read_rejects(store)
        return IndexResult(finished, rejects, store.url, was_complete=True)
    _check_target(store)

    groups, moments, rejects, num_turned = _index_blocks(
        source, columns, num_processes, pixel_limit, on_progress
    )

    if not moments.pixels:
        write_rejects(store, rejects)
        raise UserError(
            f"none of the {_count_rows(source.blocks)} images in "
            f"{source.store.redacted_url} could be decoded "
            f"({describe_main_reason(rejects)}): see "
            f"{store.redacted_url}/{REJECTS_FILE}"
        )
    shards_url = None
    if manifest_url is not None:
        shards_url = source.store.local_path or source.store.url
    manifest = _build_manifest(source, columns, groups, moments, shards_url)

    # Write only now: to build the manifest, every file is asked for its size, which may
    # take minutes. The manifest comes last: it makes the files a data set.
    write_rejects(store, rejects)
    write_finished_plan(store, plan)
    store.write(MANIFEST_FILE, manifest.to_json().encode(), retry_seconds=RETRY_SECONDS)
    return IndexResult(manifest, rejects, store.url, num_turned)


def _index_blocks(
    source: ImageSource,
    columns: ColumnNames | None,
    num_processes: int,
    pixel_limit: int,
    on_progress: Callable[[DatasetProgress], None],
) -> _IndexedBlocks:
    """Index all blocks."""
    # A task is one row group: that of a Parquet file, or adjacent files of a tar.
    if columns is None:
        tasks = _group_adjacent_blocks(source.blocks)
        index_blocks = index_tar_blocks
    else:
        tasks = ([block] for block in source.blocks)
        index_blocks = index_row_group
    tasks_with_limit = ((blocks, pixel_limit) for blocks in tasks)

    # Index the row groups in processes; results come in their order.
    groups: dict[str, list[RowGroup]] = {}
    moments = PixelMoments()
    rejects = list(source.rejects)
    num_turned = 0
    progress = DatasetProgress(0, _count_rows(source.blocks), 0)
    on_progress(progress)
    with open_process_pool(num_processes, source.reader, source.store.url) as pool:
        for (blocks, _), decoded in pool.map_tasks(index_blocks, tasks_with_limit):
            moments.merge_moments(decoded.moments)
            rejects.extend(decoded.rejects)
            num_turned += decoded.num_turned
            if decoded.group is not None:
                groups.setdefault(blocks[0].path, []).append(decoded.group)
            progress = _advance_progress(progress, blocks)
            on_progress(progress)
    return _IndexedBlocks(groups, moments, rejects, num_turned)


def _check_indexable(source: ImageSource, store: Store) -> None:
    """Raise UserError if the source cannot be indexed.

    It may be a folder of images, or its URL may contain a secret that the manifest
    would store.
    """
    if source.blocks[0].start is None:
        raise UserError(
            f"{source.store.redacted_url} is a folder of image files, and index takes "
            "Parquet or tar files: use distrain pack"
        )
    # A manifest in another place stores the URL of the files.
    if store is not source.store and source.store.redacted_url != source.store.url:
        raise UserError(
            f"the URL of {source.store.redacted_url} contains a secret, which the "
            "manifest would store: pass the URL without it"
        )


def _check_target(store: Store) -> None:
    """Check that a manifest can be written to a folder.

    Raises:
        UserError: a manifest exists already, or the folder cannot be written to.
        AttemptError: a manifest exists, and the store does not answer.
    """
    if store.exists(MANIFEST_FILE):
        # A damaged one has a message of its own.
        Manifest.load(store)
        raise UserError(
            f"{store.redacted_url} has a {MANIFEST_FILE} already, of other files, "
            "options or versions: train on it as it is, or delete that file to index "
            "again"
        )
    _check_writable(store)


def _check_writable(store: Store) -> None:
    # Fail now rather than after hours of reading.
    try:
        store.write(_PROBE_FILE, b"")
        store.remove(_PROBE_FILE)
    # Ctrl-C leaves nothing behind.
    except KeyboardInterrupt:
        with suppress(OSError):
            store.remove(_PROBE_FILE)
        raise
    except OSError as error:
        raise UserError(
            f"cannot write to {store.redacted_url} ({error.strerror or error}): set "
            "`to` to another folder for the manifest"
        ) from None


def _build_manifest(
    source: ImageSource,
    columns: ColumnNames | None,
    groups: Mapping[str, Sequence[RowGroup]],
    moments: PixelMoments,
    shards_url: str | None,
) -> Manifest:
    """Build the manifest of the row groups of each file. Raises OSError."""
    layout: Layout = "tar" if columns is None else "parquet"
    shards = [
        _build_shard(source.store, path, layout, tuple(file_groups))
        for path, file_groups in groups.items()
    ]
    return Manifest(
        shards=tuple(shards),
        classes=source.classes,
        image_size=None,
        encoding="jpeg",
        verified=True,
        statistics=moments.to_statistics(),
        layout=layout,
        image_column=columns.image if columns else "",
        shards_url=shards_url,
        pixel_hash=describe_pixel_hash(),
    )


def _build_shard(
    store: Store, path: str, layout: Layout, groups: tuple[RowGroup, ...]
) -> Shard:
    size = store.get_size(path)
    footer_start = 0
    footer_crc32c = 0
    if layout == "parquet":
        footer_start, data = read_footer(store, path, size, RETRY_SECONDS)
        footer_crc32c = crc32c(data)
    # No SHA-256, since the file was not read as a whole; the ETag shows replacements.
    etag = store.get_etag(path)
    return Shard(path, size, groups, None, footer_start, footer_crc32c, etag)


def compute_color_statistics(
    source: ImageSource,
    *,
    num_processes: int = 1,
    on_progress: Callable[[DatasetProgress], None] = lambda progress: None,
) -> tuple[ColorStatistics, list[Reject]]:
    """Read and decode all images of a source once, and return their color statistics.

    Also returns the images that are left out, such as those that do not decode.

    Raises:
        UserError: no image decodes.
        RunError: a process was killed.
        OSError: the source fails for longer than a minute.
    """
    moments = PixelMoments()
    rejects = list(source.rejects)
    progress = DatasetProgress(0, _count_rows(source.blocks), 0)
    on_progress(progress)
    tasks = group_into_tasks(
        source.blocks, lambda block: (block.num_rows, block.num_bytes)
    )
    with open_process_pool(num_processes, source.reader, source.store.url) as pool:
        for blocks, decoded in pool.map_tasks(measure_colors, tasks):
            moments.merge_moments(decoded.moments)
            rejects.extend(decoded.rejects)
            progress = _advance_progress(progress, blocks)
            on_progress(progress)
    if not moments.pixels:
        raise UserError(
            f"none of the {progress.total} images in {source.store.redacted_url} could "
            "be decoded"
        )
    return moments.to_statistics(), rejects


def _count_rows(blocks: Sequence[Block]) -> int:
    return sum(block.num_rows for block in blocks)


def _advance_progress(
    progress: DatasetProgress, blocks: Sequence[Block]
) -> DatasetProgress:
    return progress._replace(
        done=progress.done + _count_rows(blocks),
        num_bytes=progress.num_bytes + sum(block.num_bytes for block in blocks),
    )


def _group_adjacent_blocks(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    """Group files that follow each other in an archive into row groups.

    A group is one read in training, so its rows and bytes are limited.
    """
    group: list[Block] = []
    for block in sorted(blocks, key=lambda block: (block.path, block.start)):
        if group and not _fits_in_group(block, group):
            yield group
            group = []
        group.append(block)
    if group:
        yield group


def _fits_in_group(block: Block, group: Sequence[Block]) -> bool:
    if block.path != group[0].path or len(group) == MAX_GROUP_ROWS:
        return False
    return get_block_end(block) - (group[0].start or 0) <= TARGET_GROUP_BYTES
