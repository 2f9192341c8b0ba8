"""Header of a JPEG file: a strict check of what DALI is given, and the image's size.

DALI 2.4 can crash the process on bytes that it cannot parse, so this comes before it.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_SOI = b"\xff\xd8"
_EOI = b"\xff\xd9"
# Frame headers of baseline, extended and progressive JPEG: the ones that DALI decodes.
_SOF = range(0xC0, 0xC3)
_SOS = 0xDA
_APP1 = 0xE1
# Huffman codes and quantization. Without them each decoder fails in its own way.
_TABLE_MARKERS = {0xC4, 0xDB}
# What may come before the scan: frames, tables, restart intervals, application data,
# comments. DALI's parser fails on reserved markers, and may crash the process after
# such a failure.
_HEADER_MARKERS = {*_SOF, *_TABLE_MARKERS, 0xDD, *range(0xE0, 0xF0), 0xFE}
_TAIL_BYTES = 64


class JpegHeader(NamedTuple):
    """Parsed header of a well-formed JPEG file."""

    height: int
    """Pixels, as they are stored: the image may have to be turned."""
    width: int
    num_components: int
    """1: gray, 3: YCbCr or RGB, 4: CMYK or YCCK."""
    app1_segments: list[memoryview]
    """Contents of the APP1 segments: EXIF and XMP."""


def parse_jpeg_size(data: NDArray[np.uint8]) -> tuple[int, int] | None:
    """Return height and width of a well-formed JPEG file, None for anything else."""
    header = parse_jpeg_header(data)
    return None if header is None else (header.height, header.width)


def parse_jpeg_header(data: NDArray[np.uint8]) -> JpegHeader | None:
    """Return the header of a well-formed JPEG file, None for anything else.

    A file is well-formed if
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
    frame: tuple[int, int, int] | None = None
    markers_seen = set[int]()
    app1_segments: list[memoryview] = []
    while position + 4 <= len(raw) and raw[position] == 0xFF:
        marker = raw[position + 1]
        length = (raw[position + 2] << 8) | raw[position + 3]
        if length < 2 or position + 2 + length > len(raw):
            return None
        if marker == _SOS:
            if frame is None or not markers_seen >= _TABLE_MARKERS:
                return None
            return JpegHeader(*frame, app1_segments)
        if marker not in _HEADER_MARKERS:
            return None
        markers_seen.add(marker)
        if marker in _SOF:
            is_second_frame = frame is not None
            frame = _parse_frame(raw[position + 2 : position + 2 + length])
            if is_second_frame or frame is None:
                return None
        elif marker == _APP1:
            app1_segments.append(raw[position + 4 : position + 2 + length])
        position += 2 + length
    return None


def _parse_frame(frame: memoryview) -> tuple[int, int, int] | None:
    """Return height, width and number of components from a JPEG frame header.

    None if a decoder may fail on it.

    Args:
        frame: the header, beginning with its length.
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
    return height, width, num_components
