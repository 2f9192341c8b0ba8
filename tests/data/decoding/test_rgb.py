"""What becomes of the bits of an image: right values, or a refusal that names the kind."""

import io
import struct

import numpy as np
import pytest
from photos import picture
from PIL import Image

from distrain.data.decoding.bad_image import BadImageError
from distrain.data.decoding.image import decode_rgb

LIMIT = 1_000_000
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2
# Two rows of three values of 16 bits.
VALUES = np.array([[0, 1000, 4095], [4000, 2048, 65535]])


def tiff(
    data: bytes,
    bits: int,
    sample_format: int = UNSIGNED,
    photometric: int = BLACK_IS_ZERO,
    order: str = "<",
    samples: int = 1,
    others: tuple[tuple[int, int, int], ...] = (),
) -> bytes:
    """A TIFF of 2 x 3 pixels without compression; `others` are (tag, type, value)."""
    entries = [
        (256, 4, 3),
        (257, 4, 2),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8),
        (277, 3, samples),
        (278, 4, 2),
        (279, 4, len(data)),
        (339, 3, sample_format),
        *others,
    ]
    data += b"\0" * (len(data) % 2)
    out = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(
        f"{order}L", 8 + len(data)
    )
    out += data + struct.pack(f"{order}H", len(entries))
    for tag, kind, value in sorted(entries):
        out += struct.pack(f"{order}HHL", tag, kind, 1)
        if kind == 3:
            out += struct.pack(f"{order}HH", value, 0)
        else:
            out += struct.pack(f"{order}L", value)
    return out + bytes(4)


def gray(data: bytes) -> list[list[int]]:
    """The one channel of a gray image."""
    pixels = decode_rgb(data, LIMIT)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].tolist()


def scaled(values: np.ndarray, white: int) -> list[list[int]]:
    return np.floor(values * 255 / white + 0.5).astype(int).tolist()


@pytest.mark.parametrize("order", "<>")
def test_16_bit_gray_is_scaled_from_its_full_range(order):
    data = VALUES.astype(f"{order}u2").tobytes()
    assert gray(tiff(data, 16, order=order)) == scaled(VALUES, 65535)
    pgm = b"P5 3 2 65535\n" + VALUES.astype(">u2").tobytes()
    assert gray(pgm) == scaled(VALUES, 65535)
    for kind in ("PNG", "TIFF", "JPEG2000"):
        sink = io.BytesIO()
        Image.fromarray(VALUES.astype(np.uint16)).save(sink, kind)
        assert gray(sink.getvalue()) == scaled(VALUES, 65535), kind


@pytest.mark.parametrize("white", [1023, 4095, 16383])
def test_netpbm_says_what_is_white(white):
    values = np.array([[0, 100, 250], [500, 1000, white]])
    pgm = b"P5 3 2 %d\n" % white + values.astype(">u2").tobytes()
    assert np.abs(np.array(gray(pgm)) - scaled(values, white)).max() <= 1
    ppm = b"P6 3 2 %d\n" % white + values.repeat(3).astype(">u2").tobytes()
    assert np.abs(np.array(gray(ppm)) - scaled(values, white)).max() <= 1


def test_12_bits_of_a_tiff_are_scaled_from_the_range_of_12():
    values = np.array([[0, 1000, 4095], [4000, 2048, 255]])
    # Each row begins with a new byte.
    rows = ("".join(f"{value:03x}" for value in row) + "0" for row in values)
    assert gray(tiff(bytes.fromhex("".join(rows)), 12)) == scaled(values, 4095)


def test_a_tiff_whose_zero_is_white_is_inverted():
    inverted = (255 - np.array(scaled(VALUES, 65535))).tolist()
    data = VALUES.astype("<u2").tobytes()
    assert gray(tiff(data, 16, photometric=WHITE_IS_ZERO)) == inverted
    eight = np.arange(6, dtype=np.uint8).reshape(2, 3)
    data = tiff(eight.tobytes(), 8, photometric=WHITE_IS_ZERO)
    assert gray(data) == (255 - eight).tolist()


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (tiff(VALUES.astype("<f4").tobytes(), 32, FLOAT), "32-bit floats"),
        (tiff(VALUES.astype(">f4").tobytes(), 32, FLOAT, order=">"), "32-bit floats"),
        (tiff(VALUES.astype("<u4").tobytes(), 32), "32-bit integers"),
        (tiff(VALUES.astype("<i4").tobytes(), 32, SIGNED), "32-bit signed integers"),
        (tiff(VALUES.astype("<u2").tobytes(), 16, SIGNED), "16-bit signed integers"),
        (tiff(bytes(range(6)), 8, SIGNED), "8-bit signed integers"),
        (b"Pf 3 2 -1.0\n" + VALUES.astype("<f4").tobytes(), "32-bit floats"),
    ],
)
def test_what_has_no_range_is_refused_by_name(data, name):
    with pytest.raises(BadImageError, match=f"^{name}: convert it to 8 or 16 bits"):
        decode_rgb(data, LIMIT)
    # Sets that were indexed before keep such pixels.
    assert decode_rgb(data, LIMIT, 1).shape == (2, 3, 3)


@pytest.mark.parametrize("kind", ["float64", "float16"])
def test_what_pil_does_not_open_is_named_too(kind):
    data = tiff(
        (VALUES / 65535).astype(kind).tobytes(), np.dtype(kind).itemsize * 8, FLOAT
    )
    with pytest.raises(BadImageError, match="a kind of TIFF that is not read: convert"):
        decode_rgb(data, LIMIT)


@pytest.mark.parametrize(
    "others", [((254, 4, 1),), ((50706, 4, 0x00000401),), ((254, 4, 1), (50706, 4, 1))]
)
def test_the_thumbnail_of_a_raw_file_is_no_image(others):
    data = tiff(bytes(range(18)), 8, photometric=RGB, samples=3, others=others)
    with pytest.raises(BadImageError, match="^a camera's raw file, or a TIFF that beg"):
        decode_rgb(data, LIMIT)


def test_a_tiff_of_several_pages_is_its_first():
    pages = [Image.fromarray(picture(i, 40, 60)) for i in range(2)]
    sink = io.BytesIO()
    pages[0].save(sink, "TIFF", save_all=True, append_images=pages[1:])
    assert np.array_equal(decode_rgb(sink.getvalue(), LIMIT), picture(0, 40, 60))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "RGB"])
def test_8_bits_and_fewer_are_what_pil_makes_of_them(kind, mode):
    image = Image.fromarray(picture(0, 40, 60)).convert(mode)
    sink = io.BytesIO()
    image.save(sink, kind)
    found = decode_rgb(sink.getvalue(), LIMIT)
    assert np.array_equal(found, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB"])
def test_other_colors_of_a_tiff(mode):
    image = Image.fromarray(picture(0, 40, 60))
    if mode == "LAB":
        image = Image.merge("LAB", image.split())
    image = image.convert(mode)
    sink = io.BytesIO()
    image.save(sink, "TIFF")
    found = decode_rgb(sink.getvalue(), LIMIT)
    assert np.array_equal(found, np.asarray(image.convert("RGB")))


def test_bigtiff():
    sink = io.BytesIO()
    Image.fromarray(picture(0, 40, 60)).save(sink, "TIFF", big_tiff=True)
    assert np.array_equal(decode_rgb(sink.getvalue(), LIMIT), picture(0, 40, 60))


def test_the_first_reading_takes_integers_for_16_bits():
    data = tiff(VALUES.astype("<i4").tobytes(), 32, SIGNED)
    assert decode_rgb(data, LIMIT, 1)[..., 0].tolist() == scaled(VALUES, 65535)
    data = tiff(VALUES.astype("<u2").tobytes(), 16, photometric=WHITE_IS_ZERO)
    assert decode_rgb(data, LIMIT, 1)[..., 0].tolist() == scaled(VALUES, 65535)
