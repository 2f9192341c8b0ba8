"""What is no image, or none that is read, is named; AVIF and JPEG 2000 are read."""

import gzip
import io
import struct
import zipfile

import numpy as np
import pytest
from photos import encoded, picture
from PIL import Image
from shapes import tar_of

from distrain.data.decoding.bad_image import BadImageError
from distrain.data.decoding.image import decode_rgb, sanitize_file

LIMIT = 1_000_000
IMAGE = "convert it to JPEG or PNG"


def ftyp(brand: bytes, *others: bytes) -> bytes:
    body = b"ftyp" + brand + bytes(4) + b"".join(others)
    return struct.pack(">L", len(body) + 4) + body + bytes(200)


def zipped() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as file:
        file.writestr("a.jpg", "x")
    return sink.getvalue()


NAMED = [
    (b"", "no bytes"),
    (bytes(5000), "nothing but zero bytes, not an image: copy or download it again"),
    (ftyp(b"heic", b"mif1", b"heic"), f"HEIC is not read: {IMAGE}"),
    (ftyp(b"mif1", b"mif1", b"heic"), f"HEIC is not read: {IMAGE}"),
    (ftyp(b"heix"), f"HEIC is not read: {IMAGE}"),
    (ftyp(b"crx "), f"camera raw (CR3) is not read: {IMAGE}"),
    (ftyp(b"isom", b"mp42"), "an MP4 or QuickTime video, not an image: leave it out"),
    (ftyp(b"qt  "), "an MP4 or QuickTime video, not an image: leave it out"),
    (b"\x1aE\xdf\xa3" + bytes(40), "a WebM or Matroska video, not an image: "),
    (b"\xff\x0a\x00", f"JPEG XL is not read: {IMAGE}"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", f"JPEG XL is not read: {IMAGE}"),
    (b"8BPS\0\1", f"PSD (Photoshop) is not read: {IMAGE}"),
    (b"%PDF-1.7\n", f"PDF is not read: {IMAGE}"),
    (b"%!PS-Adobe-3.0 EPSF", f"PostScript is not read: {IMAGE}"),
    (b"<svg xmlns='x'/>", f"SVG is not read: {IMAGE}"),
    (b"<?xml version='1.0'?>\n<!-- x -->\n<svg/>", f"SVG is not read: {IMAGE}"),
    (b"\0\0\1\0\1\0 \0", f"ICO (icon) is not read: {IMAGE}"),
    (b"FUJIFILMCCD-RAW 0201", f"camera raw (RAF) is not read: {IMAGE}"),
    (bytes(128) + b"DICM", f"DICOM is not read: {IMAGE}"),
    (b"v/1\1", f"OpenEXR is not read: {IMAGE}"),
    (b"\x93NUMPY\1\0", f"NumPy is not read: {IMAGE}"),
    (
        b"\n<!DOCTYPE html><html><svg></svg>",
        "an HTML page, not an image: download it again",
    ),
    (b"<p>Not found</p>", "an HTML page, not an image: download it again"),
    (b"<meta charset=utf-8>", "an HTML page, not an image: download it again"),
    (b"<pre>text</pre>", "the image format is not recognized"),
    (b"\xef\xbb\xbf<HTML>", "an HTML page, not an image: download it again"),
    (
        b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
        "an XML document, not an image: download it again",
    ),
    (b'{"error": 404}', "a JSON document, not an image: download it again"),
    (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
        "a Git LFS pointer, not an image: run git lfs pull",
    ),
    (gzip.compress(b"x", mtime=0), "a gzip file, not an image: unpack it"),
    (zipped(), "a zip archive, not an image: unpack it"),
    (tar_of([("a.jpg", b"x")]), "a tar archive, not an image: unpack it"),
    (b"\0\5\x16\7\0\2\0\0", "metadata of macOS (AppleDouble), not an image: "),
    (b"junk", "the image format is not recognized"),
    (b"\x89PNG\n\x1a\n" + b"x" * 30, "a damaged PNG image, or a kind of PNG that"),
    (ftyp(b"avif", b"mif1"), "ValueError|a damaged AVIF"),
]


@pytest.mark.parametrize(("data", "reason"), NAMED, ids=[reason for _, reason in NAMED])
def test_what_is_not_read_is_named(data, reason):
    with pytest.raises(BadImageError) as caught:
        decode_rgb(data, LIMIT)
    message = str(caught.value)
    assert any(message.startswith(words) for words in reason.split("|")), message


@pytest.mark.parametrize(
    ("kind", "options"),
    [("AVIF", {"quality": 95}), ("JPEG2000", {}), ("JPEG2000", {"no_jp2": True})],
)
def test_avif_and_jpeg_2000_are_read(kind, options):
    pixels = picture(0, 40, 60)
    data = encoded(pixels, kind, **options)
    found = decode_rgb(data, LIMIT).astype(int)
    assert np.abs(found - pixels).mean() < 5
    assert sanitize_file(np.frombuffer(data, np.uint8), LIMIT)[1:3] == (40, 60)


def test_an_animation_is_its_first_frame():
    frames = [Image.fromarray(picture(i, 40, 60)) for i in range(3)]
    for kind in ("AVIF", "WEBP", "PNG"):
        alone = io.BytesIO()
        frames[0].save(alone, kind)
        sink = io.BytesIO()
        frames[0].save(sink, kind, save_all=True, append_images=frames[1:])
        difference = decode_rgb(sink.getvalue(), LIMIT).astype(int) - decode_rgb(
            alone.getvalue(), LIMIT
        )
        assert np.abs(difference).mean() < 5, kind


def claiming(data: bytes, box: bytes, offset: int, height: int, width: int) -> bytes:
    """The file with another size in a box; `offset` is from the box's name."""
    order = (width, height) if box == b"ispe" else (height, width)
    start = data.index(box) + offset
    return data[:start] + struct.pack(">LL", *order) + data[start + 8 :]


@pytest.mark.parametrize(
    ("kind", "box", "offset"), [("AVIF", b"ispe", 8), ("JPEG2000", b"ihdr", 4)]
)
def test_sizes_over_the_limit_are_refused_from_the_header(kind, box, offset):
    data = claiming(encoded(picture(0, 40, 60), kind), box, offset, 9000, 9500)
    with pytest.raises(BadImageError, match="9500 x 9000 pixels are over the limit"):
        decode_rgb(data, LIMIT)


def test_a_jpeg_2000_whose_codestream_is_larger_than_it_says_is_bad():
    """Few bytes may hold many pixels: the decoder must not take memory for them."""
    large = encoded(np.zeros((1000, 1000, 3), np.uint8), "JPEG2000")
    with pytest.raises(BadImageError, match="broken data stream"):
        decode_rgb(claiming(large, b"ihdr", 4, 40, 60), LIMIT)
