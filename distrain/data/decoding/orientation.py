"""Orientation of an image: how its metadata say that it must be turned.

Pillow's reading of the tag decides, which obeys EXIF, the orientation tag of TIFF and,
where there is neither, XMP. Only that tag is read: other metadata may be damaged.
"""

import struct
from collections.abc import Sequence

from PIL import Image

ORIENTATION_TAG = 0x0112
UPRIGHT = 1
_TRANSPOSE_METHODS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_PREFIX = b"Exif\0\0"
_XMP_PREFIX = b"http://ns.adobe.com/xap/1.0/\0"
_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
_TYPE_SHORT = 3
# Bytes of a value, by TIFF type: BYTE is 1.
_TYPE_BYTES = dict(enumerate((1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8), 1))
_ENTRY_BYTES = 12


def read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, 1 to 8; 1 if it is damaged or unknown.

    Of formats that may hold their metadata after the pixels, such as PNG, it loads the
    pixels.
    """
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, UPRIGHT)
        # A RATIONAL of 6/1 is 6; a text or a tuple is no orientation.
        return int(orientation) if orientation in _TRANSPOSE_METHODS else UPRIGHT
    except MemoryError:
        raise
    except Exception:
        # PIL raises almost any exception on damaged metadata. A decoder ignores such
        # metadata, so the image is not turned.
        return UPRIGHT


def turn_upright(image: Image.Image) -> Image.Image:
    """Return the image as its orientation says that it is to be seen."""
    # PIL turns TIFF itself when it loads the pixels, and then removes the orientation.
    image.load()
    method = _TRANSPOSE_METHODS.get(read_orientation(image))
    return image if method is None else image.transpose(method)


def parse_app1_orientation(segments: Sequence[memoryview]) -> int | None:
    """Return the orientation that a JPEG file's APP1 segments hold, without PIL.

    Args:
        segments: contents of the APP1 segments.

    Returns:
        1 to 8, equal to `read_orientation`; None: the metadata are unusual, so only PIL
        can tell.
    """
    exif: memoryview | None = None
    has_xmp_orientation = False
    for segment in segments:
        if segment[: len(_EXIF_PREFIX)] == _EXIF_PREFIX:
            # PIL joins several.
            if exif is not None:
                return None
            exif = segment[len(_EXIF_PREFIX) :]
        elif segment[: len(_XMP_PREFIX)] == _XMP_PREFIX:
            has_xmp_orientation |= b"tiff:Orientation" in bytes(segment)
    orientation = None
    if exif is not None:
        values = _parse_exif_orientations(exif)
        if values is None or len(values) > 1:
            return None
        orientation = values[0] if values else None
    # XMP counts where EXIF has no orientation.
    if orientation is None:
        return None if has_xmp_orientation else UPRIGHT
    return orientation if orientation in _TRANSPOSE_METHODS else UPRIGHT


def _parse_exif_orientations(exif: memoryview) -> list[int] | None:
    """Return the values of the orientation tags in the main directory of EXIF.

    None if PIL may read something else: the directory is damaged or unusual.

    Args:
        exif: a TIFF header and what it points to.
    """
    byte_order = _BYTE_ORDERS.get(bytes(exif[:4]))
    if byte_order is None or len(exif) < 8:
        return None
    (directory,) = struct.unpack_from(f"{byte_order}L", exif, 4)
    if directory + 2 > len(exif):
        return None
    (num_entries,) = struct.unpack_from(f"{byte_order}H", exif, directory)
    start = directory + 2
    end = start + num_entries * _ENTRY_BYTES
    if end > len(exif):
        return None

    # Entry: tag (2 bytes), type (2 bytes), count (4 bytes), value or its offset.
    values: list[int] = []
    entries = struct.iter_unpack(f"{byte_order}HHLL", exif[start:end])
    for i, (tag, value_type, count, offset) in enumerate(entries):
        if tag == ORIENTATION_TAG:
            if value_type != _TYPE_SHORT or count != 1:
                return None
            position = start + i * _ENTRY_BYTES + 8
            values += struct.unpack_from(f"{byte_order}H", exif, position)
            continue
        # PIL stops at a value that lies outside, and may miss the orientation.
        num_bytes = count * _TYPE_BYTES.get(value_type, 0)
        if num_bytes > 4 and offset + num_bytes > len(exif):
            return None
    return values
