"""Prepare once, train many times: decode every image, prove it, resize it and write shards."""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrain.data.decode import BadImageError, decode, encode, is_plain, ppm, shorten, square
from distrain.data.manifest import MANIFEST, Manifest
from distrain.data.stats import PixelMoments
from distrain.data.store import Store
from distrain.data.writer import ShardWriter
from distrain.errors import UserError
from distrain.philox import Purpose, permutation
from distrain.world import cores

REJECTS = "rejects.jsonl"
_IN_FLIGHT = 256
_DIGITS_SIDE = 72
DIGITS_CLASSES = 10
DIGITS_GROUP_ROWS = np.array([100] * 14 + [38])
"""Rows of each row group of the packed training digits."""


class Packed(NamedTuple):
    """What a pack did."""

    manifest: Manifest
    rejects: list[tuple[str, str]]
    """Path and reason of each image that was left out."""


class _Image(NamedTuple):
    path: str
    label: int
    prepare: Callable[[], tuple[NDArray[np.uint8], bytes | None]]
    """Pixels as they are stored, and the file that holds them already, if one does."""


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
        raise UserError(f"geometry {text} is none of keep, short:N and square:N, with N in pixels")


def pack_folder(
    source: str,
    target: str,
    *,
    geometry: Geometry = Geometry("square", 256),
    encoding: Literal["jpeg", "raw"] = "jpeg",
    quality: int = 95,
    pixel_limit: int = 50_000_000,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Packed:
    """Pack a folder that holds one folder of images a class.

    Each image is decoded once, turned upright, made RGB, resized and encoded. Rows are permuted once, so that a row
    group holds all classes. The same source makes the same bytes. A JPEG whose geometry is kept and that is upright
    and grey or RGB already keeps its bytes.

    Args:
        source: URL or path of the folder.
        target: URL or path of the shards; must not hold a data set yet.
        geometry: the size at which images are stored.
        encoding: jpeg, or raw pixels (binary PPM, seven times the bytes), which need one size for all images.
        quality: of the JPEG, 1 to 100.
        pixel_limit: pixels; an image that claims more is rejected before memory is taken.
        progress: called with (images done, images in all).

    Raises:
        UserError: nothing to pack, raw without a square, or the target is taken.
    """
    if encoding == "raw" and geometry.kind != "square":
        raise UserError("raw pixels need one size for all images: pack them with --geometry square:N")
    folder = Store(source)
    if not folder.exists():
        raise UserError(f"no folder at {folder.name}: check the path")
    classes = [name for name in folder.list() if not name.startswith(".") and folder.is_folder(name)]
    images = [
        _Image(path, label, partial(_prepared, folder, path, geometry, pixel_limit))
        for label, name in enumerate(classes)
        for path in (f"{name}/{file}" for file in folder.list(name) if not file.startswith("."))
    ]
    if not images:
        raise UserError(f"no images in {folder.name}: it must hold one folder of images a class")
    if len(classes) < 2:
        raise UserError(f"{folder.name} holds one class, {classes[0]}, so there is nothing to tell apart")
    size = (geometry.side, geometry.side) if geometry.kind == "square" else None
    return _pack(images, classes, Store(target), size, encoding, quality, progress)


def _prepared(folder: Store, path: str, geometry: Geometry, pixel_limit: int) -> tuple[NDArray[np.uint8], bytes | None]:
    """The pixels of an image file as they will be stored, and the file itself where it can be stored as it is.

    Raises:
        BadImageError: it does not decode.
    """
    data = folder.read(path)
    pixels = decode(data, pixel_limit, upright=True)
    plain = geometry.kind == "keep" and is_plain(data)
    if geometry.kind == "keep":
        return pixels, data if plain else None
    return (shorten if geometry.kind == "short" else square)(pixels, geometry.side), None


def pack_digits(train: str, val: str, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Pack scikit-learn's 1,797 scanned digits (8 x 8 grey, enlarged to 72 x 72): every fifth is for validation."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the digits come with scikit-learn: pip install 'distrain[quickstart]'") from None
    digits = load_digits()
    # scans: (1797, 8, 8, 3), 0 to 255
    scans = np.repeat((digits.images * (255 / 16)).round().astype(np.uint8)[..., None], 3, axis=3)
    classes = [str(name) for name in digits.target_names]
    parts: dict[str, list[_Image]] = {train: [], val: []}
    for i, label in enumerate(digits.target):
        parts[val if i % 5 == 4 else train].append(_Image(f"digit-{i:04d}", int(label), partial(_scanned, scans[i])))
    for url, images in parts.items():
        store = Store(url)
        if not store.exists(MANIFEST):
            _pack(images, classes, store, (_DIGITS_SIDE, _DIGITS_SIDE), "jpeg", 95, progress)


def _scanned(scan: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], None]:
    return square(scan, _DIGITS_SIDE), None


def _pack(
    images: Sequence[_Image],
    classes: Sequence[str],
    store: Store,
    size: tuple[int, int] | None,
    encoding: Literal["jpeg", "raw"],
    quality: int,
    progress: Callable[[int, int], None],
) -> Packed:
    if store.exists(MANIFEST):
        raise UserError(f"{store.name} holds a data set already: choose another place, or delete it")
    # A group is one ranged read of some megabytes.
    rows = 100 if encoding == "jpeg" else 25
    writer = ShardWriter(store, classes, size, encoding=encoding, proved=True, group_rows=rows)
    moments, rejects = PixelMoments(), list[tuple[str, str]]()
    order = permutation(len(images), 0, Purpose.PACK)

    def prepare(image: _Image) -> tuple[NDArray[np.uint8], bytes] | BadImageError:
        try:
            pixels, data = image.prepare()
        except BadImageError as bad:
            return bad
        except IsADirectoryError:
            return BadImageError("a folder where an image should be")
        return pixels, data or (encode(pixels, quality) if encoding == "jpeg" else bytes(ppm(pixels)))

    with ThreadPoolExecutor(cores()) as pool:
        done = 0
        for batch in _batches((images[i] for i in order), _IN_FLIGHT):
            for image, made in zip(batch, pool.map(prepare, batch), strict=True):
                if isinstance(made, BadImageError):
                    rejects.append((image.path, str(made)))
                else:
                    pixels, data = made
                    moments.add(pixels)
                    writer.add(data, image.label, image.path, pixels.shape[:2])
            done += len(batch)
            progress(done, len(images))
    if rejects:
        lines = "".join(json.dumps({"path": path, "reason": reason}) + "\n" for path, reason in rejects)
        store.write(REJECTS, lines.encode())
    if not moments.pixels:
        raise UserError(f"none of the {len(images)} images could be decoded: see {store.name}/{REJECTS}")
    return Packed(writer.finish(moments.statistics()), rejects)


def _batches(images: Iterator[_Image], size: int) -> Iterator[list[_Image]]:
    while batch := list(islice(images, size)):
        yield batch
