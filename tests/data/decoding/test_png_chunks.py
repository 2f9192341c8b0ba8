"""Metadata of a PNG file can neither spoil it nor change its pixels."""

import io
import struct
import zlib

import numpy as np
import pytest
from exif import orientation
from hypothesis import given, settings
from hypothesis import strategies as st
from photos import encoded, picture
from PIL import Image, PngImagePlugin

from distrain.data.decoding.bad_image import BadImageError
from distrain.data.decoding.image import decode_rgb
from distrain.data.decoding.png_chunks import strip_png_metadata

LIMIT = 1_000_000
PIXELS = picture(0, 40, 60)
PNG = encoded(PIXELS, "PNG")
XMP = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="3"/>'
RAW_EXIF = b"Raw profile type exif\0\nexif\n %d\n%s\n"


def chunk(kind: bytes, content: bytes, *, is_damaged: bool = False) -> bytes:
    checksum = zlib.crc32(kind + content) ^ is_damaged
    return (
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
    )


def with_chunks(png: bytes, *chunks: bytes) -> bytes:
    """The file with chunks in front of its pixels."""
    start = png.index(b"IDAT") - 4
    return png[:start] + b"".join(chunks) + png[start:]


METADATA = {
    "long text": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3_000_000))),
    "long profile": chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(3_000_000))),
    "checksum of a text": chunk(b"tEXt", b"a\0b", is_damaged=True),
    "checksum of an orientation": chunk(b"iTXt", XMP, is_damaged=True),
    "short size": chunk(b"pHYs", b"\0"),
    "short gamma": chunk(b"gAMA", b""),
    "unknown": chunk(b"vpAg", b"x", is_damaged=True),
}


@pytest.mark.parametrize("name", list(METADATA))
def test_metadata_lose_no_image(name):
    data = with_chunks(PNG, METADATA[name])
    assert strip_png_metadata(data) == PNG
    assert np.array_equal(decode_rgb(data, LIMIT), PIXELS)


@pytest.mark.parametrize(
    "data",
    [
        with_chunks(PNG, chunk(b"iTXt", XMP)),
        with_chunks(PNG, chunk(b"eXIf", orientation(3).removeprefix(b"Exif\0\0"))),
        with_chunks(
            PNG,
            chunk(
                b"tEXt",
                RAW_EXIF % (len(orientation(3)), orientation(3).hex().encode()),
            ),
        ),
    ],
    ids=["XMP", "EXIF", "text of ImageMagick"],
)
def test_an_image_with_bad_metadata_is_turned(data):
    data = with_chunks(data, *METADATA.values())
    assert np.array_equal(decode_rgb(data, LIMIT), PIXELS[::-1, ::-1])


def test_transparency_and_animations_are_pixels():
    palette = Image.fromarray(PIXELS).convert("P")
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=3)
    assert strip_png_metadata(file.getvalue()) == file.getvalue()
    file = io.BytesIO()
    frames = [Image.fromarray(PIXELS), Image.fromarray(PIXELS[::-1])]
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:])
    assert strip_png_metadata(file.getvalue()) == file.getvalue()


def test_damaged_pixels_stay_a_reject():
    damaged = bytearray(PNG)
    damaged[PNG.index(b"IDAT") + 20] ^= 1
    for data in (bytes(damaged), PNG[:-40], PNG[:20], PNG[:8]):
        assert strip_png_metadata(data) == data
        with pytest.raises(BadImageError):
            decode_rgb(data, LIMIT)


def test_other_files_stay_as_they_are():
    jpeg = encoded(PIXELS)
    assert strip_png_metadata(jpeg) is jpeg
    assert strip_png_metadata(b"") == b""


@settings(max_examples=50)
@given(
    texts=st.lists(st.tuples(st.sampled_from(["a", "Comment"]), st.text(max_size=9))),
    mode=st.sampled_from(["RGB", "RGBA", "L", "LA", "P", "1", "I;16"]),
)
def test_the_pixels_stay_the_same(texts, mode):
    info = PngImagePlugin.PngInfo()
    for key, value in texts:
        info.add_itxt(key, value)
    image = Image.fromarray(PIXELS).convert("L" if mode == "I;16" else mode)
    file = io.BytesIO()
    image.convert(mode).save(file, "PNG", pnginfo=info, icc_profile=b"x" * 100)
    data = file.getvalue()
    assert np.array_equal(decode_rgb(data, LIMIT), decode_rgb(data, LIMIT, 1))
