"""Names of files by their first bytes, for the message about one that is not read."""

import re
from typing import NamedTuple

_CONVERT = "convert it to JPEG or PNG"
_DOWNLOAD = "download it again"
_LEAVE_OUT = "leave it out"
_TEXT_BYTES = 1024


class _Signature(NamedTuple):
    """First bytes of a kind of file."""

    pattern: re.Pattern[bytes]
    """Matched at the file's start."""
    name: str
    remedy: str


def _make_signatures(
    remedy: str, patterns: dict[str, bytes], name_format: str
) -> list[_Signature]:
    return [
        _Signature(
            re.compile(pattern, re.DOTALL),
            name_format.format(name),
            remedy,
        )
        for name, pattern in patterns.items()
    ]


# Images that are not read. In the files of ISO media (HEIC, MP4, ...) the brand follows
# the bytes "ftyp"; brands that several kinds share are told apart by the others.
_UNREAD_IMAGES = _make_signatures(
    _CONVERT,
    {
        "HEIC": rb"....ftyp(hei[cxms]|hev[cxms]|(mif1|msf1)(?!.{0,40}avi[fs]))",
        "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n",
        "JPEG XR": rb"II\xbc",
        "SVG": rb"(?i)(\xef\xbb\xbf)?\s*"
        rb"(<\?xml.{0,900}<svg|<!--.{0,900}<svg|<!doctype\s+svg|<svg)\b",
        "PDF": rb"%PDF",
        "PostScript": rb"%!PS|\xc5\xd0\xd3\xc6",
        "PSD (Photoshop)": rb"8BPS",
        "XCF (GIMP)": rb"gimp xcf",
        "ICO (icon)": rb"\0\0[\x01\x02]\0[^\0]",
        "ICNS (icon)": rb"icns",
        "camera raw (CR2)": rb"II\*\0....CR",
        "camera raw (CR3)": rb"....ftypcrx ",
        "camera raw (ORF)": rb"IIR[OS]|MMOR",
        "camera raw (RW2)": rb"IIU\0",
        "camera raw (RAF)": rb"FUJIFILMCCD-RAW",
        "camera raw (CRW)": rb"II.{4}HEAPCCDR",
        "camera raw (X3F)": rb"FOVb",
        "OpenEXR": rb"v/1\x01",
        "Radiance HDR": rb"#\?RADIANCE|#\?RGBE",
        "DICOM": rb".{128}DICM",
        "FITS": rb"SIMPLE  =",
        "DDS": rb"DDS ",
        "QOI": rb"qoif",
        "PAM": rb"P7\s",
        "DjVu": rb"AT&TFORM",
        "NumPy": rb"\x93NUMPY",
        "HDF5": rb"\x89HDF\r\n",
    },
    "{} is not read",
)
# What is in the place of a file that was not really downloaded.
_STAND_INS = [
    *_make_signatures(
        _DOWNLOAD,
        {
            "an HTML page": rb"(?i)(\xef\xbb\xbf)?\s*(<!--.{0,900}-->\s*)?"
            rb"<(!doctype\s+html|html|head|body|title|meta|script|style|div|h1|p)\b",
            "an XML document": rb"(?i)(\xef\xbb\xbf)?\s*<(\?xml|error)\b",
            "a JSON document": rb"(?i)(\xef\xbb\xbf)?\s*[{\[]\s*[\"{\[\]}]",
        },
        "{}",
    ),
    *_make_signatures(
        "run git lfs pull",
        {"a Git LFS pointer": rb"version https://git-lfs\.github\.com"},
        "{}",
    ),
]
_OTHER_FILES = [
    *_STAND_INS,
    *_make_signatures(
        "unpack it",
        {
            "a zip archive": rb"PK(\x03\x04|\x05\x06)",
            "a gzip file": rb"\x1f\x8b",
            "a bzip2 file": rb"BZh[1-9]",
            "an xz file": rb"\xfd7zXZ",
            "a Zstandard file": rb"\x28\xb5\x2f\xfd",
            "a 7-Zip archive": rb"7z\xbc\xaf",
            "a RAR archive": rb"Rar!",
            "a tar archive": rb".{257}ustar",
        },
        "{}",
    ),
    *_make_signatures(
        _LEAVE_OUT,
        {
            "an MP4 or QuickTime video": rb"....(ftyp(?!avi[fs]|mif1|msf1)|moov|mdat)",
            "a WebM or Matroska video": rb"\x1aE\xdf\xa3",
            "an AVI video": rb"RIFF....AVI ",
            "a sound": rb"RIFF....WAVE|ID3|OggS|fLaC",
            "a Parquet file": rb"PAR1",
            "metadata of macOS (AppleDouble)": rb"\0\x05\x16\x07",
        },
        "{}",
    ),
]
# Images that are read, if this Pillow has the decoder and the file is not damaged.
_READ_IMAGES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG",
    "GIF": rb"GIF8",
    "WebP": rb"RIFF....WEBP",
    "BMP": rb"BM.{12}",
    "BigTIFF": rb"II\+\0|MM\0\+",
    "TIFF": rb"II\*\0|MM\0\*",
    "AVIF": rb"....ftyp(avi[fs]|mif1|msf1)",
    "JPEG 2000": rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
    "netpbm": rb"P[1-6]\s",
}


def name_stand_in(data: bytes) -> str | None:
    """Return what stands in the place of a file, and what to do; or None.

    Args:
        data: the file, or its first bytes.
    """
    start = data[:_TEXT_BYTES]
    for pattern, name, remedy in _STAND_INS:
        if pattern.match(start):
            return f"{name}: {remedy}"
    return None


def name_unread_file(data: bytes) -> str | None:
    """Return what a file is that is never read as an image, and what to do; or None."""
    if not data:
        return "no bytes"
    start = data[:_TEXT_BYTES]
    for pattern, name, remedy in _UNREAD_IMAGES:
        if pattern.match(start):
            return f"{name}: {remedy}"
    for pattern, name, remedy in _OTHER_FILES:
        if pattern.match(start):
            return f"{name}, not an image: {remedy}"
    if not any(start):
        return "nothing but zero bytes, not an image: copy or download it again"
    return None


def name_damaged_image(data: bytes) -> str | None:
    """Return what an image is that is read elsewhere, but not here; or None."""
    start = data[:_TEXT_BYTES]
    for name, pattern in _READ_IMAGES.items():
        if re.match(pattern, start, re.DOTALL):
            return (
                f"a damaged {name} image, or a kind of {name} that is not read: "
                "convert it to JPEG or PNG"
            )
    return None
