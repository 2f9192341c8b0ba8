"""Image files of many kinds for tests, mutations of them, and sets made of them."""

import io
import struct
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # scripts use this module too
from sets import SetWriter

from distrain.data.shards.dataset import Dataset
from distrain.data.shards.manifest import Manifest
from distrain.data.shards.stats import ColorStatistics, PixelMoments
from distrain.data.storage.store import Store

STATISTICS = ColorStatistics.from_covariance(
    np.array([120.0, 110.0, 100.0]), np.diag([3600.0, 3000.0, 2500.0]) + 800.0
)


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """Smooth colours with some noise, like a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return np.clip(
        np.asarray(coarse) + rng.normal(0, 6, (height, width, 1)), 0, 255
    ).astype(np.uint8)


def encoded(
    pixels: np.ndarray, kind: str = "JPEG", mode: str = "RGB", **options
) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(sink, kind, **options)
    return sink.getvalue()


def write_photos(folder: Path) -> None:
    """Write eight images of two classes into each of `photos/train` and `photos/val`."""
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            images = folder / "photos" / split / label
            images.mkdir(parents=True)
            for i in range(4):
                (images / f"{i}.jpg").write_bytes(encoded(picture(i, 80, 60)))


def rotated(pixels: np.ndarray, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(pixels, exif=exif)


def grey16(pixels: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(sink, "PNG")
    return sink.getvalue()


def kinds(height: int = 83, width: int = 101) -> dict[str, bytes]:
    """One file of each kind that a decoder must take; most of one size."""
    p = [picture(i, height, width) for i in range(16)]
    alpha = np.dstack([p[9], np.full((height, width), 128, np.uint8)])
    sink = io.BytesIO()
    Image.fromarray(alpha).save(sink, "PNG")
    return {
        "rgb": encoded(p[0], quality=92),
        "4:4:4": encoded(p[1], subsampling=0),
        "4:2:2": encoded(p[2], subsampling=1),
        "grey": encoded(p[3], mode="L"),
        "cmyk": encoded(p[4], mode="CMYK"),
        "progressive": encoded(p[5], progressive=True),
        "restart markers": encoded(p[6], restart_marker_blocks=4),
        "exif": rotated(p[7], 6),
        "palette png": encoded(p[8], "PNG", "P"),
        "alpha png": sink.getvalue(),
        "png": encoded(p[10], "PNG"),
        "16-bit png": grey16(p[11]),
        "webp": encoded(p[12], "WEBP", quality=90),
        "gif": encoded(p[13], "GIF", "P"),
        "bmp": encoded(p[14], "BMP"),
        "tiff": encoded(p[15], "TIFF"),
        "1x1": encoded(picture(20, 1, 1)),
        "wide": encoded(picture(21, 5, 400)),
        "tall": encoded(picture(22, 400, 5)),
        "large": encoded(picture(23, 900, 1300)),
    }


def mutated(seed: int, sources: Sequence[bytes]) -> bytes:
    """A damaged or misleading file; the same for the same seed."""
    rng = np.random.default_rng(seed)
    data = bytearray(sources[rng.integers(len(sources))])
    way = rng.integers(8)
    if way == 0:  # bytes of the header
        for _ in range(rng.integers(1, 6)):
            data[rng.integers(min(len(data), 700))] = rng.integers(256)
    elif way == 1:  # bytes of the body
        for _ in range(rng.integers(1, 200)):
            data[rng.integers(len(data))] = rng.integers(256)
    elif way == 2:  # cut, with and without an end marker
        data = data[: rng.integers(len(data))] + (
            b"\xff\xd9" if rng.integers(2) else b""
        )
    elif way == 3:  # another format's first bytes
        other = sources[rng.integers(len(sources))]
        cut = rng.integers(1, 64)
        data[:cut] = other[:cut]
    elif way == 4:  # a size that is a lie
        data = bytearray(
            lying(bytes(data), *(int(n) for n in rng.integers(0, 65536, 2)))
        )
    elif way == 5:  # a bomb: few bytes, many pixels
        data = bytearray(bomb(int(rng.integers(5_000, 60_000))))
    elif way == 6:  # something else
        texts = [
            b"",
            b"\xff",
            b"\xff\xd8",
            b"<html>404</html>",
            rng.bytes(rng.integers(1, 3000)),
            b"\xff\xd8" + rng.bytes(500),
        ]
        data = bytearray(texts[rng.integers(len(texts))])
    else:  # pieces left out, or put in twice
        start, length = int(rng.integers(len(data))), int(rng.integers(1, 400))
        piece = data[start : start + length]
        data[start : start + length] = piece * int(rng.integers(0, 3))
    return bytes(data)


def lying(data: bytes, height: int, width: int) -> bytes:
    """The same JPEG with another size in its frame header."""
    for marker in (b"\xff\xc0", b"\xff\xc2"):
        at = data.find(marker)
        if at >= 0:
            return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]
    return data


def bomb(side: int) -> bytes:
    """A PNG of some hundred bytes that claims side x side pixels."""

    def chunk(body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body) - 4)
            + body
            + struct.pack(">I", zlib.crc32(body))
        )

    header = chunk(b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + chunk(b"IDAT" + zlib.compress(bytes(1000)))
        + chunk(b"IEND")
    )


def write_set(
    folder: Path, files: Sequence[bytes], size: tuple[int, int] | None = None, **options
) -> Dataset:
    """A set of these files in this order, three classes, not proved unless said."""
    writer = SetWriter(
        Store(str(folder)), ("a", "b", "c"), size, **{"group_rows": 16, **options}
    )
    for i, data in enumerate(files):
        writer.add(data, i % 3, f"{i}.jpg", size or true_size(data))
    writer.finish(STATISTICS)
    return open_set(folder)


def true_size(data: bytes) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except Exception:
        return 0, 0


def open_set(folder: Path | str, memory: int = 1 << 26) -> Dataset:
    store = Store(str(folder))
    return Dataset(store, Manifest.load(store), memory_bytes=memory, retry_seconds=0)


def moments(images: Sequence[np.ndarray]) -> ColorStatistics:
    found = PixelMoments()
    for image in images:
        found.add_image(image)
    return found.to_statistics()
