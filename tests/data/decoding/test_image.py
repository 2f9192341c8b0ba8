import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from distrain.data.decoding import image as image_module
from distrain.data.decoding.bad_image import BadImageError
from distrain.data.decoding.image import (
    decode_rgb,
    encode_jpeg,
    resize_short_side,
    resize_to_square,
    sanitize_file,
)
from distrain.data.decoding.jpeg_header import parse_jpeg_size

LIMIT = 1_000_000
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def file(kind="JPEG", mode="RGB", **options):
    sink = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(sink, kind, **options)
    return np.frombuffer(sink.getvalue(), np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_go_to_dali_as_they_are(mode, progressive):
    data = file(mode=mode, progressive=progressive)
    assert parse_jpeg_size(data) == (40, 60)
    assert sanitize_file(data, LIMIT) == (data, 40, 60, False)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", "RGB"), ("PNG", "P"), ("PNG", "RGBA"), ("BMP", "RGB"), ("GIF", "P")],
)
def test_other_formats_become_ppm_with_the_same_pixels(kind, mode):
    data = file(kind, mode)
    assert parse_jpeg_size(data) is None
    found = sanitize_file(data, LIMIT)
    assert found[1:] == (40, 60, False)
    ppm = bytes(found.data)
    assert ppm.startswith(b"P6 60 40 255\n")
    wanted = Image.open(io.BytesIO(bytes(data))).convert("RGB")
    assert ppm[-PIXELS.size :] == wanted.tobytes()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "^no bytes$"),
        (b"\xff", "image format is not recognized"),
        (b"<html>not found</html>", "^an HTML page, not an image: download it again$"),
        (bytes(file()[:400]), "OSError"),
        (bytes(file()[:-2]), "OSError|truncated"),
    ],
)
def test_what_does_not_decode_is_named(data, reason):
    with pytest.raises(BadImageError, match=reason):
        sanitize_file(np.frombuffer(data, np.uint8), LIMIT)


def test_a_cut_file_is_bad_whatever_the_window():
    cut = file()[: len(file()) // 2]
    with pytest.raises(BadImageError, match="truncated"):
        sanitize_file(cut, LIMIT)


@pytest.mark.parametrize(
    "error",
    [
        # Of Pillow's own decoders, and of AVIF's.
        OSError("out of memory error when reading image file"),
        RuntimeError("Pixel allocation failed: Out of memory"),
    ],
)
def test_a_lack_of_memory_is_not_the_files_fault(error, monkeypatch):
    def turn(image):
        raise error

    monkeypatch.setattr(image_module, "turn_upright", turn)
    with pytest.raises(MemoryError):
        decode_rgb(bytes(file()), LIMIT)


@pytest.mark.parametrize("side", [2000, 20000])
def test_bombs_are_refused_before_memory_is_taken(side):
    def chunk(body):
        return (
            struct.pack(">I", len(body) - 4)
            + body
            + struct.pack(">I", zlib.crc32(body))
        )

    png = chunk(b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) + chunk(
        b"IDAT" + zlib.compress(b"")
    )
    with pytest.raises(
        BadImageError, match=f"{side} x {side} pixels are over the limit"
    ):
        decode_rgb(b"\x89PNG\r\n\x1a\n" + png, LIMIT)


def test_a_jpeg_over_the_pixel_limit_is_bad():
    with pytest.raises(
        BadImageError, match="60 x 40 pixels are over the limit of 2399"
    ):
        sanitize_file(file(), 2399)
    assert sanitize_file(file(), 2400)[1:3] == (40, 60)


def test_square_is_the_centre_of_the_resized():
    image = Image.fromarray(PIXELS)
    assert np.asarray(resize_to_square(image, 40)).tolist() == PIXELS[:, 10:50].tolist()
    for width, height, side in (
        (60, 40, 20),
        (1, 1, 8),
        (3, 40, 30),
        (500, 375, 256),
        (333, 500, 256),
        (97, 31, 30),
    ):
        picture = image.resize((width, height))
        whole = np.asarray(resize_short_side(picture, side, LIMIT)).astype(int)
        top, left = (whole.shape[0] - side) // 2, (whole.shape[1] - side) // 2
        found = np.asarray(resize_to_square(picture, side)).astype(int)
        difference = np.abs(found - whole[top : top + side, left : left + side])
        assert difference.max() <= 2
        assert difference.mean() < 0.5


def test_encode_comes_back_close():
    smooth = np.tile(
        np.linspace(0, 255, 64).astype(np.uint8)[:, None, None], (1, 64, 3)
    )
    again = decode_rgb(encode_jpeg(smooth, 95), LIMIT)
    assert np.abs(again.astype(int) - smooth).max() <= 3
