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
    encode,
    is_plain,
    opened,
    ppm,
    shorten,
    software,
    square,
)
from distrain.data.prepare.source import (
    PATIENCE,
    Block,
    Progress,
    Reader,
    Refused,
    Sample,
    Source,
)
from distrain.data.prepare.workers import batches, rows_of, workers
from distrain.data.shards.manifest import (
    MANIFEST,
    Manifest,
    Shard,
    read_shard,
    shard_tree,
)
from distrain.data.shards.stats import PixelMoments
from distrain.data.shards.writer import ShardWriter
from distrain.data.storage.store import Store
from distrain.errors import UserError
from distrain.philox import Purpose, permutation

REJECTS = "rejects.jsonl"
PIXEL_LIMIT = 50_000_000
"""Pixels of an image; what claims more is refused before memory is taken."""
_NOTES = ".pack"
_PLAN = f"{_NOTES}/plan.json"
_SHARD_BYTES = 128 << 20
# Of a kept image, where its source does not say.
_USUAL_BYTES = 1 << 17


@dataclass(frozen=True)
class Geometry:
    """The size at which images are stored."""

    kind: Literal["keep", "short", "square"]
    """keep: as they are; short: the short side is `side`; square: that, then the centre square."""
    side: int = 0
    """Pixels."""

    @staticmethod
    def parse(text: str) -> "Geometry":
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
class Treatment:
    """What is done to images."""

    geometry: Geometry = Geometry("square", 256)
    encoding: Literal["jpeg", "raw"] = "jpeg"
    """jpeg, or raw pixels (binary PPM, seven times the bytes), which need one size for all images."""
    quality: int = 95
    """Of the JPEG, 1 to 100."""
    pixel_limit: int = PIXEL_LIMIT


class Packed(NamedTuple):
    """What a pack did."""

    manifest: Manifest
    rejects: list[Refused]
    """Each image, or part of the source, that was left out."""


class _Piece(NamedTuple):
    """Rows of a block that belong to a shard."""

    block: Block
    first: int
    end: int


class _Task(NamedTuple):
    """What a process is given at a time."""

    shard: int
    pieces: list[_Piece]
    last: bool
    """Of its shard."""
    treatment: Treatment


class _Image(NamedTuple):
    """An image as it is stored."""

    data: bytes
    label: int
    name: str
    size: tuple[int, int]


class _Made(NamedTuple):
    rows: list[_Image | Refused]
    moments: PixelMoments


class _Note(NamedTuple):
    """What is left of a shard when it is written."""

    shard: Shard | None
    """None: all of its images were refused."""
    moments: PixelMoments
    rejects: list[Refused]


def pack(
    source: Source,
    target: str,
    treatment: Treatment,
    *,
    processes: int = 1,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Packed:
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
    store = Store(target)
    _check(source, store, treatment)
    shards = _cut(source.blocks, treatment)
    notes = _begin(store, _plan(source, treatment), len(shards))
    total = sum(block.rows for block in source.blocks)
    at = Progress(sum(p.end - p.first for k in notes for p in shards[k]), total, 0)
    progress(at)
    with (
        workers(processes, source.reader, source.store.url) as pool,
        ThreadPoolExecutor(1) as writer,
    ):
        writing: tuple[int, Future[_Note]] | None = None
        made = _Made([], PixelMoments())
        for task, part in pool.map(_prepare, _tasks(shards, notes, treatment)):
            made.rows.extend(part.rows)
            made.moments.merge(part.moments)
            rows = sum(piece.end - piece.first for piece in task.pieces)
            size = sum(len(row.data) for row in part.rows if isinstance(row, _Image))
            at = Progress(at.done + rows, total, at.bytes + size)
            progress(at)
            if task.last:  # written beside the next one, and never more than one
                if writing is not None:
                    notes[writing[0]] = writing[1].result()
                writing = (
                    task.shard,
                    writer.submit(_write, store, source.classes, task.shard, made),
                )
                made = _Made([], PixelMoments())
        if writing is not None:
            notes[writing[0]] = writing[1].result()
    return _finish(store, source, treatment, [notes[k] for k in range(len(shards))])


def _check(source: Source, store: Store, treatment: Treatment) -> None:
    """Raises UserError where images of many sizes are to be raw, or shards would lie among the images."""
    if treatment.encoding == "raw" and treatment.geometry.kind != "square":
        raise UserError(
            "raw pixels need one size for all images: pack them with --geometry square:N"
        )
    here, there = _place(store), _place(source.store)
    if here == there or (
        source.blocks[0].start is None and here.startswith(f"{there}/")
    ):
        raise UserError(
            f"{store.name} is where the images are: choose another place for the shards"
        )


def _place(store: Store) -> str:
    return store.local or store.url.rstrip("/")


def _cut(blocks: Sequence[Block], treatment: Treatment) -> list[list[_Piece]]:
    """The pieces of each shard: blocks in a random order, joined to a line of rows, cut where a shard is full."""
    geometry, side = treatment.geometry, treatment.geometry.side
    stored = side * side * (3.0 if treatment.encoding == "raw" else 0.5)
    shards, room = list[list[_Piece]](), 0.0
    for i in permutation(len(blocks), 0, Purpose.PACK).tolist():
        block, first = blocks[i], 0
        each = (
            stored
            if geometry.kind != "keep"
            else block.size / block.rows or _USUAL_BYTES
        )
        while first < block.rows:
            if room < each:
                shards.append([])
                room = float(_SHARD_BYTES)
            rows = min(block.rows - first, max(1, int(room / each)))
            shards[-1].append(_Piece(block, first, first + rows))
            room -= rows * each
            first += rows
    return shards


def _tasks(
    shards: Sequence[Sequence[_Piece]], done: Mapping[int, object], treatment: Treatment
) -> Iterator[_Task]:
    """The work on shards that are not done."""
    for k, pieces in enumerate(shards):
        if k not in done:
            parts = list(
                batches(
                    pieces, lambda piece: (piece.end - piece.first, piece.block.size)
                )
            )
            for part in parts:
                yield _Task(k, part, last=part is parts[-1], treatment=treatment)


# --- in the processes


def _prepare(reader: Reader, task: _Task) -> _Made:
    rows, moments = list[_Image | Refused](), PixelMoments()
    read = rows_of(reader, [piece.block for piece in task.pieces])
    for piece, (_, found) in zip(task.pieces, read, strict=True):
        if isinstance(found, Refused):
            rows.extend([found] if piece.first == 0 else [])  # said once
            continue
        rows.extend(
            row if isinstance(row, Refused) else _prepared(row, task.treatment, moments)
            for row in found[piece.first : piece.end]
        )
    return _Made(rows, moments)


def _prepared(
    sample: Sample, treatment: Treatment, moments: PixelMoments
) -> _Image | Refused:
    """An image as it will be stored; its pixels are added to the moments."""
    geometry, limit = treatment.geometry, treatment.pixel_limit
    try:
        image = opened(sample.data, limit, upright=True)
        if geometry.kind == "short":
            image = shorten(image, geometry.side, limit)
        elif geometry.kind == "square":
            image = square(image, geometry.side)
        pixels = np.asarray(image)
        if treatment.encoding == "raw":
            data = bytes(ppm(pixels))
        elif geometry.kind == "keep" and is_plain(sample.data):
            data = sample.data
        else:
            data = encode(pixels, treatment.quality)
    except BadImageError as bad:
        return Refused(sample.name, str(bad))
    moments.add(pixels)
    return _Image(data, sample.label, sample.name, (image.height, image.width))


# --- the target, and how far it is


def _plan(source: Source, treatment: Treatment) -> bytes:
    """All that the shards depend on."""
    digest = hashlib.sha256()
    for block in source.blocks:
        digest.update(json.dumps(block).encode())
    how = {
        **asdict(treatment),
        "details": source.details,
        "classes": source.classes,
        "blocks": digest.hexdigest(),
        "software": software(),
    }
    return json.dumps(how, indent=1).encode()


def _begin(store: Store, plan: bytes, shards: int) -> dict[int, _Note]:
    """Take the target for this pack; notes of what a pack of the same plan has finished there.

    Raises:
        UserError: something else is there.
    """
    begun = store.read(_PLAN, patience=PATIENCE) if store.exists(_PLAN) else None
    if store.exists(MANIFEST) and begun != plan:
        raise UserError(
            f"{store.name} holds a data set already: choose another place, or delete it"
        )
    if begun is None:
        store.write(_PLAN, plan, patience=PATIENCE)
        return {}
    if begun != plan:
        raise UserError(
            f"{store.name} holds the first half of another pack, of other images, options or versions: choose another "
            "place, or delete it"
        )
    for name in store.list():
        if name.endswith(
            ".partial"
        ):  # of a file that was being written when its process was killed
            store.remove(name)
    there = set(store.list(_NOTES))
    names = {
        k: f"{_NOTES}/{_shard(k)}.json"
        for k in range(shards)
        if f"{_shard(k)}.json" in there
    }
    return {
        k: _read_note(store.read(name, patience=PATIENCE)) for k, name in names.items()
    }


def _shard(k: int) -> str:
    return f"shard-{k:05d}"


def _write(store: Store, classes: Sequence[str], k: int, made: _Made) -> _Note:
    """Write a shard and then its note. Rows of blocks are mixed once more."""
    writer, rejects = (
        ShardWriter(classes),
        [row for row in made.rows if isinstance(row, Refused)],
    )
    for i in permutation(len(made.rows), 0, Purpose.PACK, b=1 + k).tolist():
        row = made.rows[i]
        if isinstance(row, _Image):
            writer.add(row.data, row.label, row.name, row.size)
    shard = None
    if len(rejects) < len(made.rows):
        shard, data = writer.finish(f"{_shard(k)}.parquet")
        store.write(shard.path, data, patience=PATIENCE)
    note = _Note(shard, made.moments, rejects)
    tree = {
        "shard": shard and shard_tree(shard),
        "moments": vars(made.moments),
        "rejects": rejects,
    }
    store.write(
        f"{_NOTES}/{_shard(k)}.json", json.dumps(tree).encode(), patience=PATIENCE
    )
    return note


def _read_note(data: bytes) -> _Note:
    tree = json.loads(data)
    shard = tree["shard"] and read_shard(tree["shard"])
    return _Note(
        shard,
        PixelMoments(**tree["moments"]),
        [Refused(*one) for one in tree["rejects"]],
    )


def _finish(
    store: Store, source: Source, treatment: Treatment, notes: Sequence[_Note]
) -> Packed:
    """Write the table of rejects and the manifest; the notes go last."""
    moments, rejects = PixelMoments(), list(source.refused)
    for note in notes:
        moments.merge(note.moments)
        rejects.extend(note.rejects)
    write_rejects(store, rejects)
    if not moments.pixels:
        store.remove(_NOTES)
        raise UserError(
            f"none of the {len(source.blocks)} images could be decoded: see {store.name}/{REJECTS}"
        )
    side = treatment.geometry.side
    manifest = Manifest(
        shards=tuple(note.shard for note in notes if note.shard is not None),
        classes=source.classes,
        size=(side, side) if treatment.geometry.kind == "square" else None,
        encoding=treatment.encoding,
        proved=True,
        statistics=moments.statistics(),
    )
    store.write(MANIFEST, manifest.to_json().encode(), patience=PATIENCE)
    store.remove(_NOTES)
    return Packed(manifest, rejects)


def write_rejects(store: Store, rejects: Sequence[Refused]) -> None:
    """Write what was left out, a line of JSON each; no file where nothing was."""
    if rejects:
        lines = "".join(
            json.dumps({"path": name, "reason": reason}) + "\n"
            for name, reason in rejects
        )
        store.write(REJECTS, lines.encode(), patience=PATIENCE)
    elif store.exists(REJECTS):  # of an earlier try
        store.remove(REJECTS)
