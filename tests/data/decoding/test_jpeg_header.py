"""The walk through a JPEG header: what may go to DALI."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from photos import encoded, picture

from distrain.data.decoding.bad_image import BadImageError
from distrain.data.decoding.image import sanitize_file
from distrain.data.decoding.jpeg_header import parse_jpeg_header, parse_jpeg_size

LIMIT = 1_000_000
FILE = encoded(picture(0, 40, 60))


def file():
    return np.frombuffer(FILE, np.uint8)


@pytest.mark.parametrize(("mode", "components"), [("L", 1), ("RGB", 3), ("CMYK", 4)])
def test_the_header_says_size_and_components(mode, components):
    data = encoded(picture(0, 40, 60), mode=mode, exif=b"Exif\0\0abc", xmp=b"<x/>")
    header = parse_jpeg_header(np.frombuffer(data, np.uint8))
    assert header[:3] == (40, 60, components)
    assert [bytes(segment) for segment in header.app1_segments] == [
        b"Exif\0\0abc",
        b"http://ns.adobe.com/xap/1.0/\0<x/>",
    ]


@settings(max_examples=300)
@given(st.integers(0, 700), st.integers(0, 255))
def test_the_header_walk_never_fails(place, value):
    data = file().copy()
    data[place % len(data)] = value
    size = parse_jpeg_size(data)
    assert size is None or min(size) >= 1
    with contextlib.suppress(BadImageError):
        assert sanitize_file(data, LIMIT).data.dtype == np.uint8


@pytest.mark.parametrize(
    "marker",
    [0x00, 0x01, 0x02, 0xBF, 0xC3, 0xC8, 0xCC, 0xD0, 0xD8, 0xD9, 0xDC, 0xF0, 0xFF],
)
def test_markers_that_may_not_stand_before_the_scan_are_refused(marker):
    """DALI's parser calls them invalid, without the sample's name, and mostly dies of it."""
    whole = bytes(file())
    segment = bytes([0xFF, marker, 0, 4, 0, 0])
    assert (
        parse_jpeg_size(np.frombuffer(whole[:2] + segment + whole[2:], np.uint8))
        is None
    )
    comment = bytes([0xFF, 0xFE, 0, 4, 0, 0])
    assert parse_jpeg_size(
        np.frombuffer(whole[:2] + comment + whole[2:], np.uint8)
    ) == (
        40,
        60,
    )
