"""Image files: which ones DALI may decode, which need PIL first, and which are bad.

The verdict on a file is a pure function of its bytes, the data config and the reading,
never of crop, batch or rank. The reading is the version of how files are read, which
manifests store: what was indexed before keeps the reading that it was indexed with.

1. Orientation is ignored, except in TIFF. DALI decodes JPEGs of four components.
   Integers of more than 8 bits are taken for 16 bits, and floats for 8.
2. Images are turned upright (`orientation.py`). Upright JPEGs of gray or RGB pixels
   are DALI's, and PIL decodes all others. `rgb.py` has the rule for the pixels' bits.
"""

import io
import warnings
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features

from distrain.data.decoding.bad_image import BadImageError
from distrain.data.decoding.file_formats import name_damaged_image, name_unread_file
from distrain.data.decoding.jpeg_header import JpegHeader, parse_jpeg_header
from distrain.data.decoding.orientation import (
    UPRIGHT,
    parse_app1_orientation,
    read_orientation,
    turn_upright,
)
from distrain.data.decoding.png_chunks import strip_png_metadata
from distrain.data.decoding.rgb import GrayScale, convert_to_rgb, find_gray_scale
from distrain.data.shards.manifest import FIRST_READING, READING

# Two settings of the whole process, set at import and not around each call, because
# threads that decode images share them. PIL warns of damaged metadata, which nothing
# here uses; the limit on pixels is the caller's. Other code that decodes with PIL in
# the same process can set its own limit after this import.
warnings.filterwarnings("ignore", module=r"PIL\b")
Image.MAX_IMAGE_PIXELS = None

# libjpeg's own limit.
_MAX_JPEG_SIDE = 65_500


def _list_pil_formats() -> list[str]:
    """Return the formats that PIL may read.

    They are those that photographs are kept in. PIL knows more, and one of those starts
    a PostScript interpreter.
    """
    formats = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]
    # Pillow may be built without a decoder; before 11.3 it had none for AVIF.
    if features.check("jpg_2000"):
        formats.append("JPEG2000")
    with suppress(ImportError):
        from PIL import AvifImagePlugin

        # Images are decoded in parallel already.
        AvifImagePlugin.DEFAULT_MAX_THREADS = 1
        if AvifImagePlugin.SUPPORTED:
            formats.append("AVIF")
    return formats


_PIL_FORMATS = _list_pil_formats()
# DALI and PIL take some files of four components for each other's negative.
_MAX_DALI_COMPONENTS = 3


class ImageFile(NamedTuple):
    """Image file that is safe to decode, and its size in pixels."""

    data: NDArray[np.uint8]
    height: int
    width: int
    was_turned: bool = False
    """It is a JPEG that is not upright, so that PIL decoded and turned it."""


def sanitize_file(
    data: NDArray[np.uint8], pixel_limit: int, reading: int = READING
) -> ImageFile:
    """Return a file that is safe for DALI: these bytes, or a binary PPM made by PIL.

    Args:
        data: an image file.
        pixel_limit: pixels that the image may have.
        reading: version of how files are read.

    Raises:
        BadImageError: the bytes do not decode, or claim more than `pixel_limit` pixels.
    """
    header = parse_jpeg_header(data)
    orientation = UPRIGHT
    if header is not None:
        _check_pixel_limit(header.width, header.height, pixel_limit)
        if reading == FIRST_READING:
            return ImageFile(data, header.height, header.width)
        orientation = _find_jpeg_orientation(header, data)
        if orientation == UPRIGHT and header.num_components <= _MAX_DALI_COMPONENTS:
            return ImageFile(data, header.height, header.width)
    pixels = decode_rgb(bytes(data), pixel_limit, reading)
    height, width = pixels.shape[:2]
    return ImageFile(encode_ppm(pixels), height, width, orientation != UPRIGHT)


def _find_jpeg_orientation(header: JpegHeader, data: NDArray[np.uint8]) -> int:
    """Return the orientation of a well-formed JPEG file."""
    orientation = parse_app1_orientation(header.app1_segments)
    if orientation is not None:
        return orientation
    try:
        with Image.open(io.BytesIO(data.data), formats=["JPEG"]) as image:
            return read_orientation(image)
    except UnidentifiedImageError:
        # PIL refuses what the walk takes; the decoder decides.
        return UPRIGHT


def _check_pixel_limit(width: int, height: int, pixel_limit: int) -> None:
    """Raise BadImageError if an image has more than `pixel_limit` pixels."""
    if width * height > pixel_limit:
        raise BadImageError(
            f"{width} x {height} pixels are over the limit of {pixel_limit}"
        )


def encode_ppm(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Encode RGB of shape (height, width, 3) as binary PPM: header, then pixels."""
    height, width = pixels.shape[:2]
    header = _make_ppm_header(height, width)
    return np.frombuffer(header + pixels.tobytes(), np.uint8)


def view_ppm_pixels(
    data: NDArray[np.uint8], height: int, width: int
) -> NDArray[np.uint8]:
    """Return the pixels of a PPM file as a view of shape (height, width, 3).

    Raises:
        BadImageError: this is not a binary PPM file of that size.
    """
    header = _make_ppm_header(height, width)
    has_right_length = len(data) == len(header) + 3 * height * width
    if not has_right_length or bytes(data[: len(header)]) != header:
        raise BadImageError(f"not a binary PPM file of {width} x {height} pixels")
    return data[len(header) :].reshape(height, width, 3)


def _make_ppm_header(height: int, width: int) -> bytes:
    return b"P6 %d %d 255\n" % (width, height)


def decode_rgb(
    data: bytes, pixel_limit: int, reading: int = READING
) -> NDArray[np.uint8]:
    """Decode with PIL to RGB of shape (height, width, 3). See `open_rgb`."""
    return np.asarray(open_rgb(data, pixel_limit, reading))


def open_rgb(data: bytes, pixel_limit: int, reading: int = READING) -> Image.Image:
    """Decode with PIL to an RGB image.

    Args:
        data: an image file.
        pixel_limit: pixels that the image may have; more are rejected from the header,
            before memory is taken for them.
        reading: version of how files are read; all but the first turn it upright.

    Raises:
        BadImageError: the bytes do not decode, or claim more than `pixel_limit` pixels.
    """
    if reading != FIRST_READING:
        data = strip_png_metadata(data)
    try:
        with Image.open(io.BytesIO(data), formats=_PIL_FORMATS) as image:
            _check_pixel_limit(image.width, image.height, pixel_limit)
            if reading == FIRST_READING:
                return convert_to_rgb(image, GrayScale())
            scale = find_gray_scale(image)
            return convert_to_rgb(turn_upright(image), scale)
    except (BadImageError, MemoryError):
        # A lack of memory is the machine's; the bytes may be good.
        raise
    except UnidentifiedImageError:
        name = name_unread_file(data) or name_damaged_image(data)
        raise BadImageError(name or "the image format is not recognized") from None
    except Exception as error:
        # Codecs report a lack of memory as an error of the file.
        if "out of memory" in str(error).lower():
            raise MemoryError from error
        # PIL's plugins raise almost any exception on damaged bytes.
        name = name_unread_file(data)
        raise BadImageError(name or f"{type(error).__name__}: {error}") from None


def describe_codecs() -> str:
    """Return the versions of the codecs: others may decode or encode other bytes."""
    codecs = ("libjpeg_turbo", "jpg_2000", "avif")
    versions = (f"{codec} {features.version(codec)}" for codec in codecs)
    return ", ".join([f"Pillow {PIL.__version__}", *versions])


def is_plain_jpeg(data: bytes) -> bool:
    """Return True if a file that decodes is an upright JPEG of gray or RGB pixels."""
    header = parse_jpeg_header(np.frombuffer(data, np.uint8))
    if header is None or header.num_components > _MAX_DALI_COMPONENTS:
        return False
    return _find_jpeg_orientation(header, np.frombuffer(data, np.uint8)) == UPRIGHT


def resize_short_side(
    image: Image.Image, short_side: int, pixel_limit: int
) -> Image.Image:
    """Resize so that the short side is `short_side` pixels (antialiased).

    Raises:
        BadImageError: the result would have more than `pixel_limit` pixels.
    """
    width, height = _compute_resized_shape(image, short_side)
    if width * height > pixel_limit:
        raise BadImageError(
            f"resized to {width} x {height} pixels, the image is over the limit of "
            f"{pixel_limit}"
        )
    if (width, height) == image.size:
        return image
    return image.resize((width, height), Image.Resampling.LANCZOS)


def resize_to_square(image: Image.Image, side: int) -> Image.Image:
    """Resize so that the short side is `side` (antialiased); return the center square.

    Only the square is computed. Within rounding (2 of 255) it equals the square cut
    out of the whole resized image.
    """
    width, height = _compute_resized_shape(image, side)
    left = (width - side) // 2
    top = (height - side) // 2
    if (width, height) == image.size:
        return image.crop((left, top, left + side, top + side))

    # The square in pixels of the original image. Rounding must not push it over the
    # edge, which PIL would reject.
    x_scale = image.width / width
    y_scale = image.height / height
    right = min((left + side) * x_scale, image.width)
    bottom = min((top + side) * y_scale, image.height)
    box = (left * x_scale, top * y_scale, right, bottom)
    return image.resize((side, side), Image.Resampling.LANCZOS, box=box)


def _compute_resized_shape(image: Image.Image, short_side: int) -> tuple[int, int]:
    """Return width and height after a resize of the short side to `short_side`."""
    scale = short_side / min(image.size)
    width = max(short_side, round(image.width * scale))
    height = max(short_side, round(image.height * scale))
    return width, height


def crop_and_resize(
    pixels: NDArray[np.uint8],
    window_start: NDArray[np.float64],
    window_size: NDArray[np.float64],
    crop_size: int,
) -> NDArray[np.uint8]:
    """Cut a window out of an image and resize it (bilinear, antialiased).

    Args:
        pixels: RGB of shape (height, width, 3).
        window_start: top and left of the window in pixels.
        window_size: height and width of the window in pixels.
        crop_size: height and width of the result.
    """
    top, left = window_start
    height, width = window_size
    has_crop_size = (height, width) == (crop_size, crop_size)
    is_on_pixel_grid = top == int(top) and left == int(left)
    if has_crop_size and is_on_pixel_grid:
        row = int(top)
        column = int(left)
        return pixels[row : row + crop_size, column : column + crop_size]

    box = (left, top, left + width, top + height)
    resized = Image.fromarray(pixels).resize(
        (crop_size, crop_size), Image.Resampling.BILINEAR, box=box
    )
    return np.asarray(resized)


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode RGB of shape (height, width, 3) as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def encode_jpeg(pixels: NDArray[np.uint8], quality: int) -> bytes:
    """Encode RGB of shape (height, width, 3) as baseline JPEG.

    Raises:
        BadImageError: a side is longer than a JPEG can have.
    """
    height, width = pixels.shape[:2]
    if max(height, width) > _MAX_JPEG_SIDE:
        raise BadImageError(
            f"{width} x {height} pixels: a side of a JPEG has at most {_MAX_JPEG_SIDE}"
        )
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()
