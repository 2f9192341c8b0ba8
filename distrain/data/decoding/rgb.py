"""Conversion of a decoded image to 8-bit RGB: the one rule of what becomes of its bits.

- 8 bits or fewer, palettes, CMYK, YCbCr and LAB: as PIL converts them. Transparency is
  dropped: the color below it counts.
- 16-bit RGB: PIL reads the upper 8 bits.
- 16-bit gray: scaled from the range of 16 bits. Values of fewer bits in a 16-bit file
  cannot be told from a dark image. A TIFF of 12 bits is scaled from the range of 12.
- Gray of 32 bits, floats and signed integers have no range that all writers use: they
  are refused, and so is what begins with the thumbnail of a camera's raw file.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image, TiffImagePlugin

from distrain.data.decoding.bad_image import BadImageError

_NEW_SUBFILE_TYPE_TAG = 254
_BITS_TAG = 258
_PHOTOMETRIC_TAG = 262
_SAMPLE_FORMAT_TAG = 339
_DNG_VERSION_TAG = 50706
_REFUSED_FORMATS = {2: "signed integers", 3: "floats"}
_WHITE_IS_ZERO = 0
_MAX_BITS = 16
_REMEDY = "convert it to 8 or 16 bits without a sign"


class GrayScale(NamedTuple):
    """Range of gray values in an image of more than 8 bits."""

    white: int = 65535
    """Value that becomes 255."""
    is_inverted: bool = False
    """`white` stands for black, and 0 for white."""


def find_gray_scale(image: Image.Image) -> GrayScale:
    """Return how to read the values of an image that was opened and not turned yet.

    Raises:
        BadImageError: no rule is right for all images of its kind.
    """
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return _find_tiff_scale(image)
    if image.mode == "F":
        raise BadImageError(f"32-bit floats: {_REMEDY}")
    return GrayScale()


def _find_tiff_scale(image: TiffImagePlugin.TiffImageFile) -> GrayScale:
    """Return how to read the values of a TIFF. Raises BadImageError."""
    tags = image.tag_v2
    subfile_type = tags.get(_NEW_SUBFILE_TYPE_TAG)
    is_thumbnail = isinstance(subfile_type, int) and subfile_type & 1
    if is_thumbnail or _DNG_VERSION_TAG in tags:
        raise BadImageError(
            "a camera's raw file, or a TIFF that begins with a thumbnail: convert it "
            "to JPEG, PNG or a TIFF of one image"
        )
    bits = tags.get(_BITS_TAG, (1,))[0]
    sample_format = tags.get(_SAMPLE_FORMAT_TAG, (1,))[0]
    if sample_format in _REFUSED_FORMATS:
        kind = _REFUSED_FORMATS[sample_format]
        raise BadImageError(f"{bits}-bit {kind}: {_REMEDY}")
    if bits > _MAX_BITS:
        raise BadImageError(f"{bits}-bit integers: {_REMEDY}")
    # PIL inverts 8 bits by itself, but not more.
    is_inverted = tags.get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO
    return GrayScale((1 << bits) - 1, is_inverted)


def convert_to_rgb(image: Image.Image, scale: GrayScale) -> Image.Image:
    """Convert an image to 8-bit RGB.

    Args:
        image: a decoded image, turned or not.
        scale: meaning of its values, if they are integers of more than 8 bits.
    """
    if not image.mode.startswith("I"):
        # A conversion to the same mode would copy all pixels. Loading may change it.
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    # PIL's own conversion would clip to white.
    values = np.asarray(image).astype(np.int64)
    scaled = (values * 255 + scale.white // 2) // scale.white
    gray = np.clip(scaled, 0, 255).astype(np.uint8)
    if scale.is_inverted:
        gray = 255 - gray
    return Image.fromarray(gray).convert("RGB")
