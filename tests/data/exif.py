"""EXIF written by hand, with tags that no library would write."""

import struct
from collections.abc import Sequence

SHORT, LONG, RATIONAL, ASCII, UNDEFINED, FLOAT = 3, 4, 5, 2, 7, 11
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
Tag = tuple[int, int, int, bytes]
"""Tag, type, count, and the bytes of its values."""


def directory(tags: Sequence[Tag], order: str = "<") -> bytes:
    """A TIFF header and a main directory; values of more than 4 bytes come after it."""
    start = 8 + 2 + 12 * len(tags) + 4
    entries, rest = b"", b""
    for tag, kind, count, value in tags:
        entries += struct.pack(f"{order}HHL", tag, kind, count)
        if len(value) > 4:
            entries += struct.pack(f"{order}L", start + len(rest))
            rest += value + b"\0" * (len(value) % 2)
        else:
            entries += value.ljust(4, b"\0")
    magic = b"II*\0" if order == "<" else b"MM\0*"
    head = magic + struct.pack(f"{order}LH", 8, len(tags))
    return head + entries + bytes(4) + rest


def orientation(
    value: int, others: Sequence[Tag] = (), order: str = "<", kind: int = SHORT
) -> bytes:
    """EXIF with an orientation and other tags, sorted."""
    code = {SHORT: "H", LONG: "L"}[kind]
    tag = (0x0112, kind, 1, struct.pack(f"{order}{code}", value))
    return b"Exif\0\0" + directory(sorted([tag, *others]), order)


def with_segments(jpeg: bytes, *segments: bytes) -> bytes:
    """A JPEG file with APP1 segments of these contents before all others."""
    app1 = b"".join(
        b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content
        for content in segments
    )
    return jpeg[:2] + app1 + jpeg[2:]
