"""Image files: which ones DALI may decode, which need PIL first, and which are bad.

DALI 2.4 can crash the process on bytes that it cannot parse, so a strict check of the
header comes before it. The verdict on a file is a pure function of its bytes and the
data config, never of crop, batch or rank.
"""

import io
import warnings
from typing import NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError, features

# Two settings of the whole process, set at import and not around each call, because
# threads that decode images share them. PIL warns of damaged metadata, which nothing
# here uses; the limit on pixels is the caller's. Other code that decodes with PIL in
# the same process can set its own limit after this import.
warnings.filterwarnings("ignore", module=r"PIL\b")
Image.MAX_IMAGE_PIXELS = None

_SOI = b"\xff\xd8"
_EOI = b"\xff\xd9"
# Frame headers of baseline, extended and progressive JPEG: the ones that DALI decodes.
_SOF = range(0xC0, 0xC3)
_SOS = 0xDA
# Huffman codes and quantization. Without them each decoder fails in its own way.
_TABLE_MARKERS = {0xC4, 0xDB}
# What may come before the scan: frames, tables, restart intervals, application data,
# comments. DALI's parser fails on reserved markers, and may crash the process after
# such a failure.
_HEADER_MARKERS = {*_SOF, *_TABLE_MARKERS, 0xDD, *range(0xE0, 0xF0), 0xFE}
_TAIL_BYTES = 64
# libjpeg's own limit.
_MAX_JPEG_SIDE = 65_500
# The formats that photographs are kept in. PIL knows more, and one of those starts a
# PostScript interpreter.
_PIL_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_EXIF_ORIENTATION = 0x0112


class BadImageError(ValueError):
    """Bytes that are not an image to train on; the message is the reason."""


def parse_jpeg_size(data: NDArray[np.uint8]) -> tuple[int, int] | None:
    """Return height and width of a well-formed JPEG file, from its header.

    Returns None for anything else. A file is well-formed if
    - each marker up to the scan is allowed there, and its segment ends in the file;
    - it has one frame header, of 8 bits and 1, 3 or 4 components (not lossless,
      hierarchical or arithmetic);
    - its tables come before the scan;
    - its last 64 bytes hold the end marker, which a truncated file lacks.
    """
    raw = data.data
    if bytes(raw[:2]) != _SOI:
        return None
    if _EOI not in bytes(raw[-_TAIL_BYTES:]):
        return None

    # Walk the segments: marker (2 bytes), length (2 bytes, itself included), content.
    position = 2
    size: tuple[int, int] | None = None
    markers_seen = set[int]()
    while position + 4 <= len(raw) and raw[position] == 0xFF:
        marker = raw[position + 1]
        length = (raw[position + 2] << 8) | raw[position + 3]
        if length < 2 or position + 2 + length > len(raw):
            return None
        if marker == _SOS:
            return size if markers_seen >= _TABLE_MARKERS else None
        if marker not in _HEADER_MARKERS:
            return None
        markers_seen.add(marker)
        if marker in _SOF:
            is_second_frame = size is not None
            size = _parse_frame_size(raw[position + 2 : position + 2 + length])
            if is_second_frame or size is None:
                return None
        position += 2 + length
    return None


def _parse_frame_size(frame: memoryview) -> tuple[int, int] | None:
    """Return height and width from a JPEG frame header, which begins with its length.

    None if a decoder may fail on it.
    """
    if len(frame) < 8:
        return None
    precision = frame[2]
    height = (frame[3] << 8) | frame[4]
    width = (frame[5] << 8) | frame[6]
    num_components = frame[7]
    if precision != 8 or num_components not in (1, 3, 4):
        return None
    if len(frame) != 8 + 3 * num_components:
        return None
    if height == 0 or width == 0:
        return None
    return height, width


class ImageFile(NamedTuple):
    """Image file that is safe to decode, and its size in pixels."""

    data: NDArray[np.uint8]
    height: int
    width: int


def sanitize_file(data: NDArray[np.uint8], pixel_limit: int) -> ImageFile:
    """Return a file that is safe for DALI: these bytes, or a binary PPM made by PIL.

    Raises:
        BadImageError: the bytes do not decode, or claim more than `pixel_limit` pixels.
    """
    size = parse_jpeg_size(data)
    if size is None:
        pixels = decode_rgb(bytes(data), pixel_limit)
        return ImageFile(encode_ppm(pixels), *pixels.shape[:2])
    height, width = size
    if height * width > pixel_limit:
        raise BadImageError(
            f"{width} x {height} pixels are over the limit of {pixel_limit}"
        )
    return ImageFile(data, height, width)


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


def decode_rgb(data: bytes, pixel_limit: int) -> NDArray[np.uint8]:
    """Decode with PIL to RGB of shape (height, width, 3).

    Raises:
        BadImageError: the bytes do not decode, or claim more than `pixel_limit` pixels.
    """
    return np.asarray(open_rgb(data, pixel_limit))


def open_rgb(
    data: bytes, pixel_limit: int, *, apply_orientation: bool = False
) -> Image.Image:
    """Decode with PIL to an RGB image.

    Args:
        data: an image file.
        pixel_limit: pixels that the image may have; more are rejected from the header,
            before memory is taken for them.
        apply_orientation: turn the image upright, as its EXIF orientation says.

    Raises:
        BadImageError: the bytes do not decode, or claim more than `pixel_limit` pixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_PIL_FORMATS) as image:
            if image.width * image.height > pixel_limit:
                raise BadImageError(
                    f"{image.width} x {image.height} pixels are over the limit of "
                    f"{pixel_limit}"
                )
            if apply_orientation:
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):
                return _scale_gray_to_8_bits(image).convert("RGB")
            return image.convert("RGB")
    except BadImageError:
        raise
    except UnidentifiedImageError:
        raise BadImageError("the image format is not recognized") from None
    except MemoryError:
        # The machine lacks memory; the bytes may be good.
        raise
    except OSError as error:
        # libjpeg and others report a lack of memory as an error of the file.
        if "out of memory" in str(error):
            raise MemoryError from error
        raise BadImageError(f"{type(error).__name__}: {error}") from None
    except Exception as error:
        # PIL's plugins raise almost any exception on damaged bytes.
        raise BadImageError(f"{type(error).__name__}: {error}") from None


def _scale_gray_to_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit gray to 8 bits; PIL's own conversion would clip it to white."""
    values = np.asarray(image).astype(np.int64)
    scaled = (values * 255 + 32767) // 65535
    clipped = np.clip(scaled, 0, 255)
    return Image.fromarray(clipped.astype(np.uint8))


def describe_codecs() -> str:
    """Return the versions of the codecs: others may decode or encode other bytes."""
    libjpeg_version = features.version("libjpeg_turbo")
    return f"Pillow {PIL.__version__}, libjpeg-turbo {libjpeg_version}"


def is_plain_jpeg(data: bytes) -> bool:
    """Return True if a file that decodes is an upright JPEG of gray or RGB pixels."""
    if parse_jpeg_size(np.frombuffer(data, np.uint8)) is None:
        return False
    with Image.open(io.BytesIO(data)) as image:
        try:
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
        except Exception:
            # PIL raises almost any exception on damaged metadata. A decoder ignores
            # such metadata, so the image is not turned.
            orientation = 1
        return image.mode in ("L", "RGB") and orientation == 1


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
