import struct

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from photos import encoded, picture
from PIL import Image

from distrain.data.decoding import pixel_hash
from distrain.data.decoding.image import open_rgb
from distrain.data.decoding.pixel_hash import hash_pixels


def plain_hash(image):
    """The definition, byte by byte."""
    data = struct.pack("<II", image.height, image.width)
    for red, green, blue in np.asarray(image).reshape(-1, 3):
        data += bytes([red, green, blue, 255])
    return xxhash.xxh3_128(data).digest()


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_it_is_what_the_definition_says(height, width, seed):
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    assert hash_pixels(image) == plain_hash(image)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP", "PPM"])
def test_equal_pixels_in_other_files_have_one_hash(kind):
    pixels = picture(0, 30, 40)
    options = {"lossless": True} if kind == "WEBP" else {}
    image = open_rgb(encoded(pixels, kind, **options), 10_000)
    assert hash_pixels(image) == plain_hash(Image.fromarray(pixels))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA", "YCbCr", "HSV"])
def test_whatever_an_image_was_before_it_became_rgb(mode):
    image = Image.fromarray(picture(1, 9, 11)).convert(mode).convert("RGB")
    assert hash_pixels(image) == plain_hash(image)


def test_jpeg_turned_and_resized():
    image = open_rgb(encoded(picture(2, 20, 30)), 10_000)
    for changed in (image, image.rotate(90, expand=True), image.resize((7, 5))):
        assert hash_pixels(changed) == plain_hash(changed)


def test_bytes_beside_the_colors_do_not_count():
    raw = np.zeros((2, 3, 4), np.uint8)
    raw[..., 3] = 7
    image = Image.frombytes("RGB", (3, 2), raw.tobytes(), "raw", "RGBX")
    assert hash_pixels(image) == plain_hash(Image.new("RGB", (3, 2)))


def test_other_shapes_of_the_same_pixels_differ():
    hashes = {hash_pixels(Image.new("RGB", size)) for size in ((6, 2), (2, 6), (4, 3))}
    assert len(hashes) == 3


def test_an_image_in_several_blocks_and_a_pil_that_exports_nothing(monkeypatch):
    large = Image.fromarray(picture(3, 2100, 2100))
    small = large.crop((0, 0, 50, 60))
    wanted = hash_pixels(small)
    data = struct.pack("<II", 2100, 2100) + large.tobytes("raw", "RGBX")
    assert hash_pixels(large) == xxhash.xxh3_128(data).digest()

    def refuse(_):
        raise TypeError("no arrow")

    monkeypatch.setattr(pixel_hash.pa, "array", refuse)
    assert hash_pixels(small) == wanted
