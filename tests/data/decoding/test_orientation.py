"""Images are turned as their metadata say, whatever else stands in them."""

import io
import math
import struct

import numpy as np
import pytest
from exif import (
    ASCII,
    FLOAT,
    LONG,
    RATIONAL,
    SHORT,
    UNDEFINED,
    directory,
    orientation,
    with_segments,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from photos import encoded, picture
from PIL import Image

from distrain.data.decoding.image import decode_rgb, is_plain_jpeg, sanitize_file
from distrain.data.decoding.jpeg_header import parse_jpeg_header
from distrain.data.decoding.orientation import parse_app1_orientation, read_orientation
from distrain.data.prepare.pack import _prepare_image
from distrain.data.prepare.pack_options import Geometry, PackOptions
from distrain.data.prepare.source import Sample
from distrain.data.shards.stats import PixelMoments

# PIL warns of damaged metadata; pytest puts its filters before distrain's.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LIMIT = 1_000_000
FLAT = encoded(np.full((40, 60, 3), 128, np.uint8))
PIXELS = picture(0, 40, 60)
XMP = b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation=%s/>"
# What must be done to the stored pixels, by orientation, in numpy.
TURNS = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: p[::-1].swapaxes(0, 1),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: p[:, ::-1].swapaxes(0, 1),
}


def upright(jpeg: bytes, value: int) -> np.ndarray:
    return TURNS[value](decode_rgb(jpeg, LIMIT, 1))


def trained_on(data: bytes) -> np.ndarray:
    """The pixels of the file that the training decoder gets from an indexed set."""
    file = sanitize_file(np.frombuffer(data, np.uint8), LIMIT)
    pixels = np.asarray(Image.open(io.BytesIO(bytes(file.data))).convert("RGB"))
    assert pixels.shape[:2] == (file.height, file.width)
    return pixels


def packed(data: bytes) -> np.ndarray:
    options = PackOptions(Geometry("keep"), quality=100)
    stored = _prepare_image(Sample("x", 0, data), options, PixelMoments())
    return np.asarray(Image.open(io.BytesIO(stored.data)))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", [SHORT, LONG])
@pytest.mark.parametrize("value", list(range(1, 9)))
def test_index_and_pack_turn_alike(value, kind, order):
    jpeg = encoded(PIXELS)
    data = with_segments(jpeg, orientation(value, order=order, kind=kind))
    expected = upright(jpeg, value)
    assert np.array_equal(decode_rgb(data, LIMIT), expected)
    assert np.array_equal(trained_on(data), expected)
    # Encoded once more, unless it was upright.
    assert np.abs(packed(data).astype(int) - expected).max() <= (value > 1) * 12
    assert is_plain_jpeg(data) == (value == 1)
    assert decode_rgb(data, LIMIT, 1).shape == (40, 60, 3), "the first reading"


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize("value", [3, 6])
def test_other_formats_with_exif(kind, value):
    exif = Image.Exif()
    exif[0x0112] = value
    options = {"lossless": True} if kind == "WEBP" else {}
    plain = encoded(PIXELS, kind, **options)
    turned = encoded(PIXELS, kind, exif=exif, **options)
    expected = TURNS[value](decode_rgb(plain, LIMIT))
    assert np.array_equal(decode_rgb(turned, LIMIT), expected)
    assert np.array_equal(trained_on(turned), expected)


def test_xmp_turns_where_exif_says_nothing():
    jpeg = encoded(PIXELS)
    for segments, value in (
        ([XMP % b'"6"'], 6),
        ([orientation(3), XMP % b'"6"'], 3),
        ([orientation(1), XMP % b'"6"'], 1),
        ([b"Exif\0\0" + directory([]), XMP % b'"8"'], 8),
    ):
        data = with_segments(jpeg, *segments)
        assert np.array_equal(trained_on(data), upright(jpeg, value)), segments
        assert np.array_equal(decode_rgb(data, LIMIT), upright(jpeg, value))


ODD_TAGS = {
    "resolution as text": (282, ASCII, 3, b"72\0"),
    "long text as resolution": (282, ASCII, 12, b"72.00000000\0"),
    "undefined positioning": (531, UNDEFINED, 4, b"abcd"),
    "width as text": (256, ASCII, 4, b"640\0"),
    "not a number": (33434, FLOAT, 1, struct.pack("<f", math.nan)),
    "division by zero": (282, RATIONAL, 1, bytes(8)),
    "unknown type": (40000, 99, 1, b"abcd"),
    "no values": (40001, SHORT, 0, b""),
    "a subdirectory that is none": (34665, ASCII, 4, b"abc\0"),
    "a subdirectory outside": (34665, LONG, 1, b"\xff\xff\xff\xff"),
    "thumbnail as text": (513, ASCII, 4, b"abc\0"),
}


@pytest.mark.parametrize("value", [1, 6])
@pytest.mark.parametrize("name", list(ODD_TAGS))
def test_a_tag_of_a_wrong_type_loses_no_photo(name, value):
    """EXIF is never written back, so nothing but the orientation is read."""
    jpeg = encoded(PIXELS)
    data = with_segments(jpeg, orientation(value, [ODD_TAGS[name]]))
    expected = upright(jpeg, value)
    assert np.array_equal(decode_rgb(data, LIMIT), expected)
    assert np.array_equal(trained_on(data), expected)
    assert packed(data).shape == expected.shape
    png = encoded(PIXELS, "PNG", exif=orientation(value, [ODD_TAGS[name]]))
    assert np.array_equal(decode_rgb(png, LIMIT), TURNS[value](PIXELS))


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"garbage and more of it",
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        directory([(274, SHORT, 1, b"\6\0")])[:15],
        directory([(274, ASCII, 2, b"6\0")]),
        directory([(274, SHORT, 1, b"\0\0")]),
        directory([(274, SHORT, 1, b"\x09\0")]),
        directory([(274, UNDEFINED, 4, b"\6\0\0\0")]),
        directory([(274, FLOAT, 1, struct.pack("<f", math.nan))]),
        directory([(274, RATIONAL, 1, bytes(8))]),
        directory([(274, SHORT, 0xFFFFFFFF, b"\6\0")]),
        # PIL stops at a value outside, so that it does not see the orientation.
        directory([(270, ASCII, 12, b"\xff\xff\0\0"), (274, SHORT, 1, b"\6\0")]),
    ],
    ids=repr,
)
def test_an_orientation_that_is_none_turns_nothing(exif):
    jpeg = encoded(PIXELS)
    data = with_segments(jpeg, b"Exif\0\0" + exif)
    assert np.array_equal(decode_rgb(data, LIMIT), upright(jpeg, 1))
    assert np.array_equal(trained_on(data), upright(jpeg, 1))
    assert is_plain_jpeg(data)


@pytest.mark.parametrize(
    "tag",
    [
        (274, SHORT, 2, b"\6\0\1\0"),
        (274, RATIONAL, 1, struct.pack("<LL", 6, 1)),
        (274, LONG, 1, b"\6\0\0\0"),
    ],
)
def test_an_orientation_of_another_type_counts(tag):
    jpeg = encoded(PIXELS)
    data = with_segments(jpeg, b"Exif\0\0" + directory([tag]))
    assert np.array_equal(decode_rgb(data, LIMIT), upright(jpeg, 6))
    assert np.array_equal(trained_on(data), upright(jpeg, 6))


def test_plain_files_are_decided_without_pil(monkeypatch):
    """PIL takes twenty times as long to find out that a photo is upright."""
    monkeypatch.setattr(Image, "open", None)
    resolution = (282, RATIONAL, 1, struct.pack("<LL", 72, 1))
    for segments in (
        [],
        [orientation(1, [resolution])],
        [b"Exif\0\0" + directory([resolution])],
        [orientation(1), XMP % b'"1"'],
        [b"http://ns.adobe.com/xap/1.0/\0<x/>"],
    ):
        data = np.frombuffer(with_segments(FLAT, *segments), np.uint8)
        assert sanitize_file(data, LIMIT) == (data, 40, 60, False)


VALUES = st.integers(0, 10).map(lambda n: struct.pack("<H", n)) | st.binary(max_size=12)
TAGS = st.tuples(
    st.sampled_from([274, 274, 256, 282, 531, 34665, 40000]),
    st.sampled_from([SHORT, SHORT, *range(17)]),
    st.sampled_from([1, 1, 0, 2, 3, 4, 12, 1000, 1 << 29, (1 << 32) - 1]),
    VALUES,
)
DIRECTORIES = st.builds(directory, st.lists(TAGS, max_size=5), st.sampled_from("<>"))
MUTATIONS = st.lists(st.tuples(st.integers(0, 120), st.integers(0, 255)), max_size=3)


def mutate(data: bytes, mutations: list[tuple[int, int]], cut: int) -> bytes:
    mutated = bytearray(data)
    for place, value in mutations:
        mutated[place % len(mutated)] = value
    return bytes(mutated[: len(mutated) - cut])


SEGMENTS = st.builds(
    lambda exif, mutations, cut: b"Exif\0\0" + mutate(exif, mutations, cut),
    DIRECTORIES,
    MUTATIONS,
    st.sampled_from([0, 0, 0, 2, 20]),
) | st.sampled_from([XMP % b'"6"', XMP % b"6", b"Exif\0\0Exif\0\0II*\0"])


@settings(max_examples=120)
@given(st.lists(SEGMENTS, max_size=2))
@example([orientation(6), orientation(3)])
def test_the_quick_parser_agrees_with_pil_or_leaves_it_to_it(segments):
    data = with_segments(FLAT, *segments)
    header = parse_jpeg_header(np.frombuffer(data, np.uint8))
    quick = parse_app1_orientation(header.app1_segments)
    with Image.open(io.BytesIO(data)) as image:
        slow = read_orientation(image)
    assert quick in (None, slow)


def test_the_quick_parser_finds_what_cameras_write():
    for order in "<>":
        for value in range(1, 9):
            segment = orientation(value, [(305, ASCII, 9, b"software\0")], order)
            assert parse_app1_orientation([memoryview(segment)]) == value
