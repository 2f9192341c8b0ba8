"""Image files by their bytes alone: what goes to DALI as it is, what PIL must decode first, what is a bad sample.

DALI 2.4 can crash the process on bytes that it cannot parse, so a strict header walk stands in front of it.
The verdict on a file is a pure function of its bytes and the data config, never of crop, batch or rank.
"""

import io
import warnings
from typing import NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError, features

# Two settings of the process, made by importing this and not for a while, since images are decoded in threads, which
# share them: PIL's warnings are of damaged metadata, which nothing here uses, and the limit of pixels is the caller's.
# Whoever decodes with PIL beside distrain sets his own limit after this import.
warnings.filterwarnings("ignore", module=r"PIL\b")
Image.MAX_IMAGE_PIXELS = None

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_SOF = range(0xC0, 0xC3)  # baseline, extended and progressive: what DALI decodes
_SOS = 0xDA
_TABLE_MARKERS = {
    0xC4,
    0xDB,
}  # Huffman codes and quantisation: without them a decoder may fail in ways of its own
# What may stand before the scan: frames, tables, restart intervals, application data, comments. DALI's own parser
# fails on reserved markers, and after a failure of that kind the process may die.
_HEADER_MARKERS = {*_SOF, *_TABLE_MARKERS, 0xDD, *range(0xE0, 0xF0), 0xFE}
_TAIL_BYTES = 64
_MAX_JPEG_SIDE = 65_500  # libjpeg's own limit
# What people keep photographs in. PIL knows more, and one of them starts a PostScript interpreter.
_PIL_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_EXIF_ORIENTATION = 0x0112


class BadImageError(ValueError):
    """These bytes are not an image that can be trained on; the text is the reason."""


def parse_jpeg_size(data: NDArray[np.uint8]) -> tuple[int, int] | None:
    """Height and width of a well-formed JPEG file, from its header; None for anything else.

    Well-formed: every marker up to the scan is one that may stand there and has its length inside the file, there is
    one 8-bit frame header of 1, 3 or 4 components (not lossless, hierarchical or arithmetic), tables stand before the
    scan, and the end marker stands in the last 64 bytes (a cut file has none).
    """
    raw = data.data
    if bytes(raw[:2]) != _SOI or _EOI not in bytes(raw[-_TAIL_BYTES:]):
        return None
    at, size, tables = 2, None, set[int]()
    while at + 4 <= len(raw) and raw[at] == 0xFF:
        marker, length = raw[at + 1], (raw[at + 2] << 8) | raw[at + 3]
        if length < 2 or at + 2 + length > len(raw):
            return None
        if marker == _SOS:
            return size if tables >= _TABLE_MARKERS else None
        if marker not in _HEADER_MARKERS:
            return None
        tables.add(marker)
        if marker in _SOF:
            if size is not None or length < 8:
                return None
            precision, components = raw[at + 4], raw[at + 9]
            size = ((raw[at + 5] << 8) | raw[at + 6], (raw[at + 7] << 8) | raw[at + 8])
            if (
                precision != 8
                or components not in (1, 3, 4)
                or length != 8 + 3 * components
                or 0 in size
            ):
                return None
        at += 2 + length
    return None


class ImageFile(NamedTuple):
    """An image file that a decoder may have, and its size in pixels."""

    data: NDArray[np.uint8]
    height: int
    width: int


def sanitize_file(data: NDArray[np.uint8], pixel_limit: int) -> ImageFile:
    """A file that DALI can be trusted with: these bytes, or PIL's decode of them as binary PPM.

    Raises:
        BadImageError: the bytes do not decode, or claim more than `pixel_limit` pixels.
    """
    size = parse_jpeg_size(data)
    if size is None:
        pixels = decode_rgb(bytes(data), pixel_limit)
        return ImageFile(encode_ppm(pixels), *pixels.shape[:2])
    if size[0] * size[1] > pixel_limit:
        raise BadImageError(
            f"{size[1]} x {size[0]} pixels are over the limit of {pixel_limit}"
        )
    return ImageFile(data, *size)


def encode_ppm(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB of shape (height, width, 3) as a binary PPM file: a header, then the pixels as they are."""
    height, width = pixels.shape[:2]
    return np.frombuffer(_make_ppm_header(height, width) + pixels.tobytes(), np.uint8)


def view_ppm_pixels(
    data: NDArray[np.uint8], height: int, width: int
) -> NDArray[np.uint8]:
    """The pixels of a PPM file of a known size, a view of shape (height, width, 3).

    Raises:
        BadImageError: it is not such a file.
    """
    header = _make_ppm_header(height, width)
    if (
        len(data) != len(header) + 3 * height * width
        or bytes(data[: len(header)]) != header
    ):
        raise BadImageError(f"not a binary PPM file of {width} x {height} pixels")
    return data[len(header) :].reshape(height, width, 3)


def _make_ppm_header(height: int, width: int) -> bytes:
    return b"P6 %d %d 255\n" % (width, height)


def decode_rgb(data: bytes, pixel_limit: int) -> NDArray[np.uint8]:
    """Decode with PIL to RGB of shape (height, width, 3).

    Raises:
        BadImageError: with the reason.
    """
    return np.asarray(open_rgb(data, pixel_limit))


def open_rgb(
    data: bytes, pixel_limit: int, *, apply_orientation: bool = False
) -> Image.Image:
    """Decode with PIL to an RGB image; `upright` applies the EXIF orientation.

    Raises:
        BadImageError: with the reason. What claims more than `pixel_limit` pixels is refused by its header alone.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_PIL_FORMATS) as image:
            if image.width * image.height > pixel_limit:
                raise BadImageError(
                    f"{image.width} x {image.height} pixels are over the limit of {pixel_limit}"
                )
            if apply_orientation:
                ImageOps.exif_transpose(image, in_place=True)
            if not image.mode.startswith("I"):
                return image.convert("RGB")
            # 16 bits of grey, which PIL's own conversion would clip to white
            grey = (np.asarray(image).astype(np.int64) * 255 + 32767) // 65535
            return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert(
                "RGB"
            )
    except BadImageError:
        raise
    except UnidentifiedImageError:
        raise BadImageError("no image format is recognised") from None
    except MemoryError:
        raise  # says nothing about the bytes
    except OSError as error:
        if "out of memory" in str(error):
            raise MemoryError from error
        raise BadImageError(f"{type(error).__name__}: {error}") from None
    except Exception as error:  # PIL's plugins raise almost anything on damaged bytes
        raise BadImageError(f"{type(error).__name__}: {error}") from None


def describe_codecs() -> str:
    """What decodes and encodes here: other versions may make other bytes."""
    return (
        f"Pillow {PIL.__version__}, libjpeg-turbo {features.version('libjpeg_turbo')}"
    )


def is_plain_jpeg(data: bytes) -> bool:
    """Whether a file that decodes is a JPEG of grey or RGB pixels that stand upright."""
    if parse_jpeg_size(np.frombuffer(data, np.uint8)) is None:
        return False
    with Image.open(io.BytesIO(data)) as image:
        try:
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
        except (
            Exception
        ):  # PIL raises almost anything on damaged metadata, which then turns nothing
            orientation = 1
        return image.mode in ("L", "RGB") and orientation == 1


def resize_short_side(
    image: Image.Image, short_side: int, pixel_limit: int
) -> Image.Image:
    """Resize so that the short side is `short_side` pixels (antialiased).

    Raises:
        BadImageError: that would be more than `pixel_limit` pixels.
    """
    size = _compute_resized_shape(image, short_side)
    if size[0] * size[1] > pixel_limit:
        raise BadImageError(
            f"resized to {size[0]} x {size[1]} pixels it is over the limit of {pixel_limit}"
        )
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def resize_to_square(image: Image.Image, side: int) -> Image.Image:
    """Resize so that the short side is `side` (antialiased), and take the centre square, and nothing else of it.

    Within rounding (2 of 255) what cutting the square out of the whole resized image would give.
    """
    width, height = _compute_resized_shape(image, side)
    left, top = (width - side) // 2, (height - side) // 2
    if (width, height) == image.size:
        return image.crop((left, top, left + side, top + side))
    x, y = image.width / width, image.height / height
    box = (
        left * x,
        top * y,
        min((left + side) * x, image.width),
        min((top + side) * y, image.height),
    )
    return image.resize((side, side), Image.Resampling.LANCZOS, box=box)


def _compute_resized_shape(image: Image.Image, short_side: int) -> tuple[int, int]:
    """Width and height."""
    scale = short_side / min(image.size)
    return max(short_side, round(image.width * scale)), max(
        short_side, round(image.height * scale)
    )


def crop_and_resize(
    pixels: NDArray[np.uint8],
    window_start: NDArray[np.float64],
    window_size: NDArray[np.float64],
    crop_size: int,
) -> NDArray[np.uint8]:
    """A window of an image, resized (bilinear, antialiased) to crop x crop; `start` and `size` in pixels, (y, x)."""
    (top, left), (height, width) = window_start, window_size
    if (
        (height, width) == (crop_size, crop_size)
        and top == int(top)
        and left == int(left)
    ):
        return pixels[
            int(top) : int(top) + crop_size, int(left) : int(left) + crop_size
        ]
    box = (left, top, left + width, top + height)
    image = Image.fromarray(pixels)
    return np.asarray(
        image.resize((crop_size, crop_size), Image.Resampling.BILINEAR, box=box)
    )


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode RGB of shape (height, width, 3) as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def encode_jpeg(pixels: NDArray[np.uint8], quality: int) -> bytes:
    """Encode RGB of shape (height, width, 3) as baseline JPEG.

    Raises:
        BadImageError: a side is longer than JPEG can say.
    """
    if max(pixels.shape[:2]) > _MAX_JPEG_SIDE:
        raise BadImageError(
            f"{pixels.shape[1]} x {pixels.shape[0]} pixels: a side of a JPEG has at most {_MAX_JPEG_SIDE}"
        )
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()
