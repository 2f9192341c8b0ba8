"""Prepare once, train many times: decode every image, prove it, resize it and write shards."""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrain.data.decode import BadImageError, decode, encode, square
from distrain.data.manifest import MANIFEST, Manifest
from distrain.data.shards import ShardWriter
from distrain.data.stats import PixelMoments
from distrain.data.store import Store
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
    pixels: Callable[[], NDArray[np.uint8]]


def pack_folder(
    source: str,
    target: str,
    *,
    side: int = 256,
    quality: int = 95,
    pixel_limit: int = 50_000_000,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Packed:
    """Pack a folder that holds one folder of images a class.

    Each image is decoded once, turned upright, made RGB, resized so that its short side is `side`, cut to the centre
    square and encoded as JPEG. Rows are permuted once, so that a row group holds all classes. The same source makes
    the same bytes.

    Args:
        source: URL or path of the folder.
        target: URL or path of the shards; must not hold a data set yet.
        side: pixels.
        quality: of the JPEG, 1 to 100.
        pixel_limit: pixels; an image that claims more is rejected before memory is taken.
        progress: called with (images done, images in all).

    Raises:
        UserError: nothing to pack, or the target is taken.
    """
    folder = Store(source)
    if not folder.exists():
        raise UserError(f"no folder at {folder.name}: check the path")
    classes = [name for name in folder.list() if not name.startswith(".") and folder.is_folder(name)]
    images = [
        _Image(path, label, lambda path=path: decode(folder.read(path), pixel_limit, upright=True))  # type: ignore[misc]
        for label, name in enumerate(classes)
        for path in (f"{name}/{file}" for file in folder.list(name) if not file.startswith("."))
    ]
    if not images:
        raise UserError(f"no images in {folder.name}: it must hold one folder of images a class")
    if len(classes) < 2:
        raise UserError(f"{folder.name} holds one class, {classes[0]}, so there is nothing to tell apart")
    return _pack(images, classes, Store(target), side, quality, progress)


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
        parts[val if i % 5 == 4 else train].append(_Image(f"digit-{i:04d}", int(label), lambda i=i: scans[i]))  # type: ignore[misc]
    for url, images in parts.items():
        store = Store(url)
        if not store.exists(MANIFEST):
            _pack(images, classes, store, _DIGITS_SIDE, 95, progress)


def _pack(
    images: Sequence[_Image],
    classes: Sequence[str],
    store: Store,
    side: int,
    quality: int,
    progress: Callable[[int, int], None],
) -> Packed:
    if store.exists(MANIFEST):
        raise UserError(f"{store.name} holds a data set already: choose another place, or delete it")
    writer, moments, rejects = ShardWriter(store, classes, side, side), PixelMoments(), []
    order = permutation(len(images), 0, Purpose.PACK)

    def prepare(image: _Image) -> tuple[NDArray[np.uint8], bytes] | BadImageError:
        try:
            pixels = square(image.pixels(), side)
        except BadImageError as bad:
            return bad
        except IsADirectoryError:
            return BadImageError("a folder where an image should be")
        return pixels, encode(pixels, quality)

    with ThreadPoolExecutor(cores()) as pool:
        done = 0
        for batch in _batches((images[i] for i in order), _IN_FLIGHT):
            for image, made in zip(batch, pool.map(prepare, batch), strict=True):
                if isinstance(made, BadImageError):
                    rejects.append((image.path, str(made)))
                else:
                    moments.add(made[0])
                    writer.add(made[1], image.label, image.path)
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
