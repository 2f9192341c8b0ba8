"""Image files by their bytes alone: what goes to DALI as it is, what PIL must decode first, what is a bad sample.

DALI 2.4 can crash the process on bytes that it cannot parse, so a strict header walk stands in front of it.
The verdict on a file is a pure function of its bytes and the data config, never of crop, batch or rank.
"""

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_SOF = range(0xC0, 0xC3)  # baseline, extended and progressive: what DALI decodes
_SOS = 0xDA
_TABLES = {0xC4, 0xDB}  # Huffman codes and quantisation: without them a decoder may fail in ways of its own
_TAIL = 64


class BadImageError(ValueError):
    """These bytes are not an image that can be trained on; the text is the reason."""


def jpeg_size(data: NDArray[np.uint8]) -> tuple[int, int] | None:
    """Height and width of a well-formed JPEG file, from its header; None for anything else.

    Well-formed: every marker up to the scan has its length inside the file, there is one 8-bit frame header of 1, 3
    or 4 components, tables stand before the scan, and the end marker stands in the last 64 bytes (a cut file has none).
    """
    raw = data.data
    if bytes(raw[:2]) != _SOI or _EOI not in bytes(raw[-_TAIL:]):
        return None
    at, size, tables = 2, None, set[int]()
    while at + 4 <= len(raw) and raw[at] == 0xFF:
        marker, length = raw[at + 1], (raw[at + 2] << 8) | raw[at + 3]
        if length < 2 or at + 2 + length > len(raw):
            return None
        if marker == _SOS:
            return size if tables >= _TABLES else None
        tables.add(marker)
        if marker in _SOF:
            if size is not None or length < 8:
                return None
            precision, components = raw[at + 4], raw[at + 9]
            size = ((raw[at + 5] << 8) | raw[at + 6], (raw[at + 7] << 8) | raw[at + 8])
            if precision != 8 or components not in (1, 3, 4) or length != 8 + 3 * components or 0 in size:
                return None
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return None  # lossless, hierarchical or arithmetic
        at += 2 + length
    return None


def for_dali(data: NDArray[np.uint8], height: int, width: int, pixel_limit: int) -> NDArray[np.uint8]:
    """A file of the stated size that DALI decodes: these bytes, or PIL's decode of them as binary PPM.

    Raises:
        BadImageError: the bytes do not decode, or the image has another size.
    """
    size = jpeg_size(data)
    if size is None:
        pixels = decode(bytes(data), pixel_limit)
        size = pixels.shape[:2]
        data = np.frombuffer(b"P6 %d %d 255\n" % (size[1], size[0]) + pixels.tobytes(), np.uint8)
    if size != (height, width):
        raise BadImageError(f"{size[1]} x {size[0]} pixels in a data set of {width} x {height}")
    return data


def decode(data: bytes, pixel_limit: int, *, upright: bool = False) -> NDArray[np.uint8]:
    """Decode with PIL to RGB of shape (height, width, 3); `upright` applies the EXIF orientation.

    Raises:
        BadImageError: with the reason.
    """
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
            warnings.simplefilter("ignore")  # on damaged metadata, which nothing here uses
            if image.width * image.height > pixel_limit:
                raise BadImageError(f"{image.width} x {image.height} pixels are over the limit of {pixel_limit}")
            turned = ImageOps.exif_transpose(image) if upright else image
            return np.asarray(turned.convert("RGB"))
    except BadImageError:
        raise
    except UnidentifiedImageError:
        raise BadImageError("no image format is recognised") from None
    except MemoryError:
        raise  # says nothing about the bytes
    except Exception as error:  # PIL's plugins raise almost anything on damaged bytes
        raise BadImageError(f"{type(error).__name__}: {error}") from None


def square(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Resize so that the short side is `side` (antialiased), then take the centre square."""
    height, width = pixels.shape[:2]
    scale = side / min(height, width)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    image = Image.fromarray(pixels)
    if size != (width, height):
        image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))


def encode(pixels: NDArray[np.uint8], quality: int) -> bytes:
    """Encode RGB of shape (height, width, 3) as baseline JPEG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()
