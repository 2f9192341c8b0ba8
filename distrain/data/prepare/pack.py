"""Prepare once, train many times: decode every image, prove it, resize it and write shards.

The rows of a source are put in one random order and cut into shards, so that what a shard holds is a function of the
source and the settings alone. A shard that is written leaves a note, and a pack that was killed goes on from its notes.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import numpy as np

from distrain.data.decoding.image import (
    BadImageError,
    describe_codecs,
    encode_jpeg,
    encode_ppm,
    is_plain_jpeg,
    open_rgb,
    resize_short_side,
    resize_to_square,
)
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
    ImageSource,
    Reject,
    Sample,
)
from distrain.data.shards.manifest import (
    MANIFEST_FILE,
    Manifest,
    Shard,
    shard_from_dict,
    shard_to_dict,
)
from distrain.data.shards.stats import PixelMoments
from distrain.data.shards.writer import ShardWriter
from distrain.data.storage.store import Store
from distrain.errors import UserError
from distrain.philox import Purpose, draw_permutation

REJECTS_FILE = "rejects.jsonl"
DEFAULT_PIXEL_LIMIT = 50_000_000
"""Pixels of an image; what claims more is refused before memory is taken."""
_NOTES_FOLDER = ".pack"
_PLAN_FILE = f"{_NOTES_FOLDER}/plan.json"
_TARGET_SHARD_BYTES = 128 << 20
# Of a kept image, where its source does not say.
_TYPICAL_IMAGE_BYTES = 1 << 17


@dataclass(frozen=True)
class Geometry:
    """The size at which images are stored."""

    kind: Literal["keep", "short", "square"]
    """keep: as they are; short: the short side is `side`; square: that, then the centre square."""
    side: int = 0
    """Pixels."""

    @staticmethod
    def from_text(text: str) -> "Geometry":
        """Read keep, short:N or square:N.

        Raises:
            UserError: it is none of them.
        """
        kind, _, side = text.partition(":")
        if text == "keep":
            return Geometry("keep")
        if kind in ("short", "square") and side.isdecimal() and int(side) > 0:
            return Geometry("short" if kind == "short" else "square", int(side))
        raise UserError(
            f"geometry {text} is none of keep, short:N and square:N, with N in pixels"
        )


@dataclass(frozen=True)
class PackOptions:
    """What is done to images."""

    geometry: Geometry = Geometry("square", 256)
    encoding: Literal["jpeg", "raw"] = "jpeg"
    """jpeg, or raw pixels (binary PPM, seven times the bytes), which need one size for all images."""
    quality: int = 95
    """Of the JPEG, 1 to 100."""
    pixel_limit: int = DEFAULT_PIXEL_LIMIT


class PackResult(NamedTuple):
    """What a pack did."""

    manifest: Manifest
    rejects: list[Reject]
    """Each image, or part of the source, that was left out."""


class _RowRange(NamedTuple):
    """Rows of a block that belong to a shard."""

    block: Block
    start: int
    end: int


class _PackTask(NamedTuple):
    """What a process is given at a time."""

    shard_number: int
    row_ranges: list[_RowRange]
    is_last_of_shard: bool
    """Of its shard."""
    options: PackOptions


class _StoredImage(NamedTuple):
    """An image as it is stored."""

    data: bytes
    label: int
    name: str
    image_size: tuple[int, int]


class _PreparedRows(NamedTuple):
    rows: list[_StoredImage | Reject]
    moments: PixelMoments


class _ShardNote(NamedTuple):
    """What is left of a shard when it is written."""

    shard: Shard | None
    """None: all of its images were refused."""
    moments: PixelMoments
    rejects: list[Reject]


def pack_dataset(
    source: ImageSource,
    target_url: str,
    options: PackOptions,
    *,
    num_processes: int = 1,
    on_progress: Callable[[DatasetProgress], None] = lambda progress: None,
) -> PackResult:
    """Write the images of a source as shards, each decoded once, turned upright, made RGB, resized and encoded.

    The same source makes the same bytes. A JPEG whose geometry is kept and that is upright and grey or RGB already
    keeps its bytes. Where a pack of the same source was killed, its finished shards stay and the rest is made.

    Args:
        source: what to pack.
        target: URL or path of the shards; must not hold a data set yet, nor the half of another one.
        treatment: what is done to images.
        processes: how many decode at once.
        progress: called after every few images.

    Raises:
        UserError: raw without a square, none of the images decodes, or the target is taken.
        RunError: a process was killed.
        OSError: source or target fail for longer than a minute.
    """
    store = Store(target_url)
    _check_packable(source, store, options)
    shards = _assign_rows_to_shards(source.blocks, options)
    notes = _claim_target(store, _encode_plan(source, options), len(shards))
    total = sum(block.num_rows for block in source.blocks)
    at = DatasetProgress(
        sum(p.end - p.start for k in notes for p in shards[k]), total, 0
    )
    on_progress(at)
    with (
        open_process_pool(num_processes, source.reader, source.store.url) as pool,
        ThreadPoolExecutor(1) as writer,
    ):
        writing: tuple[int, Future[_ShardNote]] | None = None
        made = _PreparedRows([], PixelMoments())
        for task, part in pool.map_tasks(
            _prepare_rows, _iter_tasks(shards, notes, options)
        ):
            made.rows.extend(part.rows)
            made.moments.merge_moments(part.moments)
            rows = sum(piece.end - piece.start for piece in task.row_ranges)
            size = sum(
                len(row.data) for row in part.rows if isinstance(row, _StoredImage)
            )
            at = DatasetProgress(at.done + rows, total, at.num_bytes + size)
            on_progress(at)
            if (
                task.is_last_of_shard
            ):  # written beside the next one, and never more than one
                if writing is not None:
                    notes[writing[0]] = writing[1].result()
                writing = (
                    task.shard_number,
                    writer.submit(
                        _write_shard, store, source.classes, task.shard_number, made
                    ),
                )
                made = _PreparedRows([], PixelMoments())
        if writing is not None:
            notes[writing[0]] = writing[1].result()
    return _finish_pack(store, source, options, [notes[k] for k in range(len(shards))])


def _check_packable(source: ImageSource, store: Store, options: PackOptions) -> None:
    """Raises UserError where images of many sizes are to be raw, or shards would lie among the images."""
    if options.encoding == "raw" and options.geometry.kind != "square":
        raise UserError(
            "raw pixels need one size for all images: pack them with --geometry square:N"
        )
    here, there = _get_location(store), _get_location(source.store)
    if here == there or (
        source.blocks[0].start is None and here.startswith(f"{there}/")
    ):
        raise UserError(
            f"{store.redacted_url} is where the images are: choose another place for the shards"
        )


def _get_location(store: Store) -> str:
    return store.local_path or store.url.rstrip("/")


def _assign_rows_to_shards(
    blocks: Sequence[Block], options: PackOptions
) -> list[list[_RowRange]]:
    """The pieces of each shard: blocks in a random order, joined to a line of rows, cut where a shard is full."""
    geometry, side = options.geometry, options.geometry.side
    stored = side * side * (3.0 if options.encoding == "raw" else 0.5)
    shards, room = list[list[_RowRange]](), 0.0
    for i in draw_permutation(len(blocks), 0, Purpose.PACK).tolist():
        block, first = blocks[i], 0
        each = (
            stored
            if geometry.kind != "keep"
            else block.num_bytes / block.num_rows or _TYPICAL_IMAGE_BYTES
        )
        while first < block.num_rows:
            if room < each:
                shards.append([])
                room = float(_TARGET_SHARD_BYTES)
            rows = min(block.num_rows - first, max(1, int(room / each)))
            shards[-1].append(_RowRange(block, first, first + rows))
            room -= rows * each
            first += rows
    return shards


def _iter_tasks(
    shards: Sequence[Sequence[_RowRange]],
    finished: Mapping[int, object],
    options: PackOptions,
) -> Iterator[_PackTask]:
    """The work on shards that are not done."""
    for k, pieces in enumerate(shards):
        if k not in finished:
            parts = list(
                group_into_tasks(
                    pieces,
                    lambda piece: (piece.end - piece.start, piece.block.num_bytes),
                )
            )
            for part in parts:
                yield _PackTask(
                    k, part, is_last_of_shard=part is parts[-1], options=options
                )


# --- in the processes


def _prepare_rows(reader: BlockReader, task: _PackTask) -> _PreparedRows:
    rows, moments = list[_StoredImage | Reject](), PixelMoments()
    read = prefetch_blocks(reader, [piece.block for piece in task.row_ranges])
    for piece, (_, found) in zip(task.row_ranges, read, strict=True):
        if isinstance(found, Reject):
            rows.extend([found] if piece.start == 0 else [])  # said once
            continue
        rows.extend(
            row
            if isinstance(row, Reject)
            else _prepare_image(row, task.options, moments)
            for row in found[piece.start : piece.end]
        )
    return _PreparedRows(rows, moments)


def _prepare_image(
    sample: Sample, options: PackOptions, moments: PixelMoments
) -> _StoredImage | Reject:
    """An image as it will be stored; its pixels are added to the moments."""
    geometry, limit = options.geometry, options.pixel_limit
    try:
        image = open_rgb(sample.data, limit, apply_orientation=True)
        if geometry.kind == "short":
            image = resize_short_side(image, geometry.side, limit)
        elif geometry.kind == "square":
            image = resize_to_square(image, geometry.side)
        pixels = np.asarray(image)
        if options.encoding == "raw":
            data = bytes(encode_ppm(pixels))
        elif geometry.kind == "keep" and is_plain_jpeg(sample.data):
            data = sample.data
        else:
            data = encode_jpeg(pixels, options.quality)
    except BadImageError as bad:
        return Reject(sample.name, str(bad))
    moments.add_image(pixels)
    return _StoredImage(data, sample.label, sample.name, (image.height, image.width))


# --- the target, and how far it is


def _encode_plan(source: ImageSource, options: PackOptions) -> bytes:
    """All that the shards depend on."""
    digest = hashlib.sha256()
    for block in source.blocks:
        digest.update(json.dumps(block).encode())
    how = {
        **asdict(options),
        "details": source.plan_details,
        "classes": source.classes,
        "blocks": digest.hexdigest(),
        "software": describe_codecs(),
    }
    return json.dumps(how, indent=1).encode()


def _claim_target(store: Store, plan: bytes, num_shards: int) -> dict[int, _ShardNote]:
    """Take the target for this pack; notes of what a pack of the same plan has finished there.

    Raises:
        UserError: something else is there.
    """
    begun = (
        store.read(_PLAN_FILE, retry_seconds=RETRY_SECONDS)
        if store.exists(_PLAN_FILE)
        else None
    )
    if store.exists(MANIFEST_FILE) and begun != plan:
        raise UserError(
            f"{store.redacted_url} holds a data set already: choose another place, or delete it"
        )
    if begun is None:
        store.write(_PLAN_FILE, plan, retry_seconds=RETRY_SECONDS)
        return {}
    if begun != plan:
        raise UserError(
            f"{store.redacted_url} holds the first half of another pack, of other images, options or versions: choose another "
            "place, or delete it"
        )
    for name in store.list_names():
        if name.endswith(
            ".partial"
        ):  # of a file that was being written when its process was killed
            store.remove(name)
    there = set(store.list_names(_NOTES_FOLDER))
    names = {
        k: f"{_NOTES_FOLDER}/{_format_shard_name(k)}.json"
        for k in range(num_shards)
        if f"{_format_shard_name(k)}.json" in there
    }
    return {
        k: _parse_note(store.read(name, retry_seconds=RETRY_SECONDS))
        for k, name in names.items()
    }


def _format_shard_name(shard_number: int) -> str:
    return f"shard-{shard_number:05d}"


def _write_shard(
    store: Store, classes: Sequence[str], shard_number: int, prepared: _PreparedRows
) -> _ShardNote:
    """Write a shard and then its note. Rows of blocks are mixed once more."""
    writer, rejects = (
        ShardWriter(classes),
        [row for row in prepared.rows if isinstance(row, Reject)],
    )
    for i in draw_permutation(
        len(prepared.rows), 0, Purpose.PACK, b=1 + shard_number
    ).tolist():
        row = prepared.rows[i]
        if isinstance(row, _StoredImage):
            writer.add_row(row.data, row.label, row.name, row.image_size)
    shard = None
    if len(rejects) < len(prepared.rows):
        shard, data = writer.finish_shard(f"{_format_shard_name(shard_number)}.parquet")
        store.write(shard.path, data, retry_seconds=RETRY_SECONDS)
    note = _ShardNote(shard, prepared.moments, rejects)
    tree = {
        "shard": shard and shard_to_dict(shard),
        "moments": vars(prepared.moments),
        "rejects": rejects,
    }
    store.write(
        f"{_NOTES_FOLDER}/{_format_shard_name(shard_number)}.json",
        json.dumps(tree).encode(),
        retry_seconds=RETRY_SECONDS,
    )
    return note


def _parse_note(data: bytes) -> _ShardNote:
    tree = json.loads(data)
    shard = tree["shard"] and shard_from_dict(tree["shard"])
    return _ShardNote(
        shard,
        PixelMoments(**tree["moments"]),
        [Reject(*one) for one in tree["rejects"]],
    )


def _finish_pack(
    store: Store, source: ImageSource, options: PackOptions, notes: Sequence[_ShardNote]
) -> PackResult:
    """Write the table of rejects and the manifest; the notes go last."""
    moments, rejects = PixelMoments(), list(source.rejects)
    for note in notes:
        moments.merge_moments(note.moments)
        rejects.extend(note.rejects)
    write_rejects(store, rejects)
    if not moments.pixels:
        store.remove(_NOTES_FOLDER)
        raise UserError(
            f"none of the {len(source.blocks)} images could be decoded: see {store.redacted_url}/{REJECTS_FILE}"
        )
    side = options.geometry.side
    manifest = Manifest(
        shards=tuple(note.shard for note in notes if note.shard is not None),
        classes=source.classes,
        image_size=(side, side) if options.geometry.kind == "square" else None,
        encoding=options.encoding,
        verified=True,
        statistics=moments.to_statistics(),
    )
    store.write(MANIFEST_FILE, manifest.to_json().encode(), retry_seconds=RETRY_SECONDS)
    store.remove(_NOTES_FOLDER)
    return PackResult(manifest, rejects)


def write_rejects(store: Store, rejects: Sequence[Reject]) -> None:
    """Write what was left out, a line of JSON each; no file where nothing was."""
    if rejects:
        lines = "".join(
            json.dumps({"path": name, "reason": reason}) + "\n"
            for name, reason in rejects
        )
        store.write(REJECTS_FILE, lines.encode(), retry_seconds=RETRY_SECONDS)
    elif store.exists(REJECTS_FILE):  # of an earlier try
        store.remove(REJECTS_FILE)
