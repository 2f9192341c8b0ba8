"""Pack a source: decode, check and resize every image once, and write shards.

The blocks of a source (image files, ranges of an archive or row groups: see
`source.Block`) are permuted, their rows are cut into shards (see `shard_plan`), and the
rows of each shard are shuffled. So the contents of a shard depend on the source, the
options and the versions of the codecs alone. Each finished shard leaves a note (see
`pack_notes`), from which an interrupted pack resumes.
"""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import NamedTuple

import numpy as np

from distrain.data.decoding.bad_image import BadImageError
from distrain.data.decoding.image import (
    encode_jpeg,
    encode_ppm,
    is_plain_jpeg,
    open_rgb,
    resize_short_side,
    resize_to_square,
)
from distrain.data.decoding.pixel_hash import describe_pixel_hash, hash_pixels
from distrain.data.prepare.pack_notes import (
    ShardNote,
    claim_target,
    format_shard_name,
    has_notes,
    remove_notes,
    write_note,
)
from distrain.data.prepare.pack_options import PackOptions
from distrain.data.prepare.plan import (
    encode_plan,
    find_finished,
    write_finished_plan,
)
from distrain.data.prepare.process_pool import (
    ProcessPool,
    group_into_tasks,
    open_process_pool,
    prefetch_blocks,
)
from distrain.data.prepare.rejects import (
    REJECTS_FILE,
    count_images,
    describe_main_reason,
    read_rejects,
    write_rejects,
)
from distrain.data.prepare.shard_plan import RowRange, assign_rows_to_shards
from distrain.data.prepare.source import (
    RETRY_SECONDS,
    BlockReader,
    DatasetProgress,
    ImageSource,
    Reject,
    Sample,
)
from distrain.data.prepare.validation_rows import SplitCounts
from distrain.data.shards.manifest import MANIFEST_FILE, Manifest
from distrain.data.shards.stats import PixelMoments
from distrain.data.shards.writer import ShardWriter
from distrain.data.storage.store import Store
from distrain.errors import UserError
from distrain.philox import Purpose, draw_permutation

_TARGET_SHARD_BYTES = 128 << 20


class PackResult(NamedTuple):
    """Result of a pack."""

    manifest: Manifest
    rejects: list[Reject]
    """Every image, or part of the source, that was left out."""
    was_complete: bool = False
    """True if an earlier pack had made the same data set: nothing was read."""
    val: "PackResult | None" = None
    """Result of the validation set, if the images were divided."""
    split: SplitCounts | None = None
    """Images of both by class; None also if both were complete."""


class _PackTask(NamedTuple):
    """Unit of work of a process."""

    shard_number: int
    row_ranges: list[RowRange]
    is_last_of_shard: bool
    options: PackOptions


class _StoredImage(NamedTuple):
    """Image file as it is stored."""

    data: bytes
    label: int
    name: str
    image_size: tuple[int, int]
    """Height and width in pixels."""
    pixel_hash: bytes
    """Hash of the upright pixels before it was resized."""


class _PreparedRows(NamedTuple):
    rows: list[_StoredImage | Reject]
    moments: PixelMoments


def pack_dataset(
    source: ImageSource,
    target_url: str,
    options: PackOptions,
    *,
    num_processes: int = 1,
    on_progress: Callable[[DatasetProgress], None] = lambda progress: None,
    log: Callable[[str], None] | None = None,
) -> PackResult:
    """Decode each image once, turn it upright, convert it to RGB, resize and store it.

    The same source, options and versions of the codecs give the same bytes. With
    geometry keep, an upright gray or RGB JPEG keeps its bytes. If an earlier pack of
    the same source with the same options was interrupted, its finished shards stay and
    only the others are made; if it has finished, its result is returned.

    Args:
        source: the images.
        target_url: URL or path of the shards; it must not hold another data set, nor
            an unfinished pack of another one.
        options: how images are stored.
        num_processes: number of decoding processes.
        on_progress: called after every few images.
        log: gets a line if a write to the target fails and is retried.

    Raises:
        UserError: raw encoding without a square geometry, none of the images decodes,
            or the target is taken, in the folder of the images, or cannot be written
            to.
        RunError: a process was killed.
        OSError: source or target fail for longer than a minute.
    """
    # Look for the same data set, which an earlier call may have finished.
    store = Store(target_url, log=log)
    check_packable(source, store, options)
    plan = encode_plan(source, asdict(options))
    finished = find_finished_pack(store, plan)
    if finished is not None:
        num_rows = sum(block.num_rows for block in source.blocks)
        on_progress(DatasetProgress(num_rows, num_rows, 0))
        return finished

    # Plan the shards and claim the target before any image is read.
    shards = assign_rows_to_shards(
        source.blocks, _TARGET_SHARD_BYTES, _estimate_image_bytes(options)
    )
    notes = claim_target(store, plan, len(shards))

    # Count the rows of finished shards as done.
    rows_done = sum(
        row_range.num_rows for number in notes for row_range in shards[number]
    )
    rows_total = sum(block.num_rows for block in source.blocks)
    progress = DatasetProgress(rows_done, rows_total, 0)
    on_progress(progress)

    # Prepare the shards in processes, and write them in a thread of this one.
    with (
        open_process_pool(num_processes, source.reader, source.store.url) as pool,
        ThreadPoolExecutor(1) as writer,
    ):
        tasks = _iter_tasks(shards, set(notes), options)
        pending: tuple[int, Future[ShardNote]] | None = None
        for number, prepared in _prepare_shards(pool, tasks, progress, on_progress):
            # Write this shard while the next one is prepared, but wait for the one
            # before: each takes about 128 MiB of memory.
            if pending is not None:
                notes[pending[0]] = pending[1].result()
            future = writer.submit(
                _write_shard, store, source.classes, number, prepared
            )
            pending = (number, future)
        if pending is not None:
            notes[pending[0]] = pending[1].result()

    ordered_notes = [notes[number] for number in range(len(shards))]
    return _finish_pack(store, source, options, plan, ordered_notes)


def check_packable(source: ImageSource, store: Store, options: PackOptions) -> None:
    """Raise UserError if options do not fit, or the target overlaps the source."""
    if options.encoding == "raw" and options.geometry.kind != "square":
        raise UserError(
            "raw pixels need one size for all images: pack them with "
            "--geometry square:N"
        )
    # A folder inside an image folder would be read as a class by the next pack.
    # Blocks of tars and Parquet files, which have a start, are not in such folders.
    source_location = get_location(source.store)
    target_location = get_location(store)
    is_image_folder = source.blocks[0].start is None
    is_inside_source = target_location.startswith(f"{source_location}/")
    if target_location == source_location or (is_image_folder and is_inside_source):
        raise UserError(
            f"{store.redacted_url} is in the folder of the images: choose a place for "
            "the shards outside it"
        )


def get_location(store: Store) -> str:
    """Return a text that is equal for stores of one folder."""
    if store.local_path is not None:
        # `.`, `..` and links: `../shards` is not in the folder `.`.
        return os.path.realpath(store.local_path)
    return store.url.rstrip("/")


def find_finished_pack(store: Store, plan: bytes) -> PackResult | None:
    """Return the result of an earlier pack of the same plan, if all of it is there."""
    manifest = find_finished(store, plan)
    if manifest is None:
        return None
    names = set(store.list_names())
    if any(shard.path not in names for shard in manifest.shards):
        return None
    # A pack that is killed at its very end leaves its notes.
    if has_notes(store):
        remove_notes(store)
    return PackResult(manifest, read_rejects(store), was_complete=True)


def _estimate_image_bytes(options: PackOptions) -> float | None:
    """Estimate the bytes of a resized image; None: images keep their size."""
    if options.geometry.kind == "keep":
        return None
    # Three bytes per raw pixel. Half a byte per pixel of a JPEG is a little more than
    # usual (a seventh of raw).
    side = options.geometry.side
    return side * side * (3.0 if options.encoding == "raw" else 0.5)


def _iter_tasks(
    shards: Sequence[Sequence[RowRange]],
    finished: Collection[int],
    options: PackOptions,
) -> Iterator[_PackTask]:
    """Yield the tasks of each unfinished shard, shard by shard."""
    for number, row_ranges in enumerate(shards):
        if number in finished:
            continue
        groups = list(
            group_into_tasks(
                row_ranges,
                lambda row_range: (row_range.num_rows, row_range.block.num_bytes),
            )
        )
        for i, group in enumerate(groups, 1):
            yield _PackTask(number, group, i == len(groups), options)


def _prepare_shards(
    pool: ProcessPool,
    tasks: Iterator[_PackTask],
    progress: DatasetProgress,
    on_progress: Callable[[DatasetProgress], None],
) -> Iterator[tuple[int, _PreparedRows]]:
    """Yield the number and the rows of each shard, prepared by the processes."""
    prepared = _PreparedRows([], PixelMoments())
    for task, task_result in pool.map_tasks(_prepare_rows, tasks):
        prepared.rows.extend(task_result.rows)
        prepared.moments.merge_moments(task_result.moments)

        # Report progress after each task.
        num_rows = sum(row_range.num_rows for row_range in task.row_ranges)
        images = [row for row in task_result.rows if isinstance(row, _StoredImage)]
        progress = progress._replace(
            done=progress.done + num_rows,
            num_bytes=progress.num_bytes + sum(len(image.data) for image in images),
        )
        on_progress(progress)

        if task.is_last_of_shard:
            yield task.shard_number, prepared
            prepared = _PreparedRows([], PixelMoments())


# --- run in the processes


def _prepare_rows(reader: BlockReader, task: _PackTask) -> _PreparedRows:
    rows: list[_StoredImage | Reject] = []
    moments = PixelMoments()
    blocks = [row_range.block for row_range in task.row_ranges]
    blocks_read = prefetch_blocks(reader, blocks)
    for row_range, (_, block_rows) in zip(task.row_ranges, blocks_read, strict=True):
        if isinstance(block_rows, Reject):
            # A block may be cut between shards: list it once, with its first row.
            if row_range.start == 0:
                num_rows = row_range.block.num_rows
                rows.append(block_rows._replace(num_images=num_rows))
            continue
        for row in block_rows[row_range.start : row_range.end]:
            if isinstance(row, Sample):
                rows.append(_prepare_image(row, task.options, moments))
            else:
                rows.append(row)
    return _PreparedRows(rows, moments)


def _prepare_image(
    sample: Sample, options: PackOptions, moments: PixelMoments
) -> _StoredImage | Reject:
    """Decode, resize and encode an image, and add its stored pixels to the moments."""
    geometry = options.geometry
    pixel_limit = options.pixel_limit
    try:
        image = open_rgb(sample.data, pixel_limit)
        pixel_hash = hash_pixels(image)
        if geometry.kind == "short":
            image = resize_short_side(image, geometry.side, pixel_limit)
        elif geometry.kind == "square":
            image = resize_to_square(image, geometry.side)
        pixels = np.asarray(image)
        if options.encoding == "raw":
            data = bytes(encode_ppm(pixels))
        elif geometry.kind == "keep" and is_plain_jpeg(sample.data):
            # An upright gray or RGB JPEG: encoding it again would lose quality.
            data = sample.data
        else:
            data = encode_jpeg(pixels, options.quality)
    except BadImageError as error:
        return Reject(sample.name, str(error))
    moments.add_image(pixels)
    image_size = (image.height, image.width)
    return _StoredImage(data, sample.label, sample.name, image_size, pixel_hash)


# --- write the target


def _write_shard(
    store: Store, classes: Sequence[str], shard_number: int, prepared: _PreparedRows
) -> ShardNote:
    """Write a shard and then its note; return the note."""
    # Shuffle the rows, since those of one block still follow each other.
    writer = ShardWriter(classes)
    # b = 0 is the order of the blocks (`shard_plan`). The seed is always 0: a pack has
    # none.
    order = draw_permutation(len(prepared.rows), 0, Purpose.PACK, b=1 + shard_number)
    for i in order.tolist():
        row = prepared.rows[i]
        if isinstance(row, _StoredImage):
            writer.add_row(
                row.data, row.label, row.name, row.image_size, row.pixel_hash
            )

    # Write no file for a shard without an image.
    rejects = [row for row in prepared.rows if isinstance(row, Reject)]
    shard = None
    if len(rejects) < len(prepared.rows):
        shard, data = writer.finish_shard(f"{format_shard_name(shard_number)}.parquet")
        store.write(shard.path, data, retry_seconds=RETRY_SECONDS)

    # The note comes last: it says that the shard is complete.
    note = ShardNote(shard, prepared.moments, rejects)
    write_note(store, shard_number, note)
    return note


def _finish_pack(
    store: Store,
    source: ImageSource,
    options: PackOptions,
    plan: bytes,
    notes: Sequence[ShardNote],
) -> PackResult:
    """Write the list of rejects and the manifest, then remove the notes."""
    moments = PixelMoments()
    rejects = list(source.rejects)
    for note in notes:
        moments.merge_moments(note.moments)
        rejects.extend(note.rejects)
    write_rejects(store, rejects)
    if not moments.pixels:
        remove_notes(store)
        raise UserError(
            f"none of the {count_images(rejects):,} images could be decoded "
            f"({describe_main_reason(rejects)}): see "
            f"{store.redacted_url}/{REJECTS_FILE}"
        )

    # The manifest makes the shards a data set. Only then are the notes removed, so
    # that a pack that is killed in between can finish again.
    side = options.geometry.side
    manifest = Manifest(
        shards=tuple(note.shard for note in notes if note.shard is not None),
        classes=source.classes,
        image_size=(side, side) if options.geometry.kind == "square" else None,
        encoding=options.encoding,
        verified=True,
        statistics=moments.to_statistics(),
        pixel_hash=describe_pixel_hash(),
    )
    write_finished_plan(store, plan)
    store.write(MANIFEST_FILE, manifest.to_json().encode(), retry_seconds=RETRY_SECONDS)
    remove_notes(store)
    return PackResult(manifest, rejects)
