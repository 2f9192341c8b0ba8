"""Chunks of PNG files: leave out those that do not matter for the upright pixels.

Pillow reads texts and color profiles and refuses the file if they are damaged or long.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Length and type before the content, checksum after it.
_HEADER_BYTES = 8
_CHECKSUM_BYTES = 4
# Ancillary chunks that change the pixels: transparency and animation.
_PIXEL_TYPES = {b"tRNS", b"acTL", b"fcTL", b"fdAT"}
# Those that may hold the orientation. A text begins with its keyword.
_EXIF_TYPE = b"eXIf"
_TEXT_TYPES = {b"tEXt", b"zTXt", b"iTXt"}
_ORIENTATION_KEYWORDS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
# A lowercase first letter marks a chunk as ancillary.
_ANCILLARY_BIT = 0x20


class _Chunk(NamedTuple):
    """Chunk of a PNG file."""

    type: bytes
    start: int
    """First byte in the file, that of the length."""
    end: int


def strip_png_metadata(data: bytes) -> bytes:
    """Return a PNG file without metadata; other and damaged files as they are.

    Pixels and orientation stay the same. Chunks of metadata that hold an orientation
    are left out only if their checksum is wrong.
    """
    if not data.startswith(_SIGNATURE):
        return data
    kept = bytearray(_SIGNATURE)
    end = len(_SIGNATURE)
    for chunk in _list_chunks(data):
        if _is_kept(data, chunk):
            kept += data[chunk.start : chunk.end]
        end = chunk.end
    # What follows the last whole chunk decides whether the file is damaged.
    kept += data[end:]
    return data if len(kept) == len(data) else bytes(kept)


def _list_chunks(data: bytes) -> Iterator[_Chunk]:
    """Yield the whole chunks of a PNG file up to its end."""
    start = len(_SIGNATURE)
    while start + _HEADER_BYTES <= len(data):
        num_bytes, chunk_type = struct.unpack_from(">I4s", data, start)
        end = start + _HEADER_BYTES + num_bytes + _CHECKSUM_BYTES
        if end > len(data):
            return
        yield _Chunk(chunk_type, start, end)
        if chunk_type == b"IEND":
            return
        start = end


def _is_kept(data: bytes, chunk: _Chunk) -> bool:
    is_ancillary = bool(chunk.type[0] & _ANCILLARY_BIT)
    if not is_ancillary or chunk.type in _PIXEL_TYPES:
        return True
    content_start = chunk.start + _HEADER_BYTES
    is_orientation_text = chunk.type in _TEXT_TYPES and data.startswith(
        _ORIENTATION_KEYWORDS, content_start
    )
    if chunk.type != _EXIF_TYPE and not is_orientation_text:
        return False
    # The checksum is of type and content.
    content_end = chunk.end - _CHECKSUM_BYTES
    (checksum,) = struct.unpack_from(">I", data, content_end)
    return bool(checksum == zlib.crc32(data[content_start - 4 : content_end]))
