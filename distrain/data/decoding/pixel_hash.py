"""Hash of an image's pixels: equal for files that decode to the same image.

It is the 128-bit xxh3 of height and width (32 bits each, little-endian) and then of
every pixel in four bytes: red, green, blue and 255. That is how PIL holds RGB images in
memory, so that a photograph is hashed without a copy, in a hundredth of the time that
it takes to decode and resize it.
"""

import struct

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray
from PIL import Image

from distrain.data.decoding.image import describe_codecs
from distrain.data.shards.entries import HASH_BYTES
from distrain.data.shards.manifest import PixelHash

HASH_NAME = "xxh3-128 of height, width, RGBX"
"""Name of the definition, for manifests."""
# The fourth byte of a pixel, in a 32-bit number of either byte order.
_PADDING = np.frombuffer(b"\0\0\0\xff", np.uint32)[0]


NO_HASH = bytes(HASH_BYTES)
"""Stands for the hash of an image that does not decode."""


def describe_pixel_hash() -> PixelHash:
    """Return the definition of `hash_pixels`, and the decoder of this environment."""
    return PixelHash(HASH_NAME, describe_codecs())


def hash_pixels(image: Image.Image) -> bytes:
    """Return the hash of an RGB image, 16 bytes."""
    return hash_rgbx(view_rgbx(image))


def hash_rgbx(pixels: NDArray[np.uint8]) -> bytes:
    """Return the hash of an RGB image, 16 bytes.

    Args:
        pixels: the image, as `view_rgbx` returns it.
    """
    height, width = pixels.shape[:2]
    words = pixels.view(np.uint32).reshape(-1)
    # Some decoders leave other values in the bytes that stand beside the colors.
    if np.bitwise_and.reduce(words) & _PADDING != _PADDING:
        words = words | _PADDING
    state = xxhash.xxh3_128(struct.pack("<II", height, width))
    state.update(words.data)
    return state.digest()


def view_rgbx(image: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels of an RGB image, shape (height, width, 4), if possible a view.

    Their fourth byte may have any value.
    """
    assert image.mode == "RGB", image.mode
    # Not every version of PIL exports its memory, and none that of an image in several
    # blocks (16 MiB and more).
    try:
        array = pa.array(image)
    except (pa.ArrowException, ValueError, TypeError):
        rgb = np.asarray(image)
        padded = np.full((*rgb.shape[:2], 4), 255, np.uint8)
        padded[..., :3] = rgb
        return padded
    values = np.frombuffer(array.values.buffers()[1], np.uint8)
    return values.reshape(image.height, image.width, 4)
