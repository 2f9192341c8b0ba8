"""Unpack wheels for a GPU machine, without what a Hopper GPU does not need: `slim.py WHEELS SITE`.

Left out of libraries are the machine code of other GPUs and the symbol tables. Their bytes are set to zero and stay
where they are, so that no offset moves and the library still loads; zeros cost nothing once they are compressed. A
library that went through this runs on sm_90 only.
"""

import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ARCH = 90
FATBIN = 0xBA55ED50
"""The first four bytes of a container of GPU code."""
MACHINE_CODE = 2
"""The kind of an entry in a container; 1 is PTX."""
LOADED = 2
"""The flag of an ELF section that is loaded with the library."""
CODECS = {
    "libnvjpeg_ext",
    "libjpeg_turbo_ext",
    "libnvpnm_ext",
    "libnvbmp_ext",
    "libopencv_ext",
}
"""The extensions of nvImageCodec that stay: distrain hands DALI JPEG and PPM files only."""


class Section(NamedTuple):
    """A section of an ELF file."""

    name: str
    offset: int
    size: int
    flags: int


class Entry(NamedTuple):
    """GPU code for one architecture."""

    kind: int
    arch: int
    offset: int
    size: int


def elf_sections(data: bytes) -> list[Section]:
    """List the sections of a 64-bit little-endian ELF file; none of any other file."""
    if data[:6] != b"\x7fELF\x02\x01":
        return []
    (table,) = struct.unpack_from("<Q", data, 0x28)
    entry_size, count, names_index = struct.unpack_from("<HHH", data, 0x3A)
    rows = [
        struct.unpack_from("<IIQQQQIIQQ", data, table + i * entry_size)
        for i in range(count)
    ]
    names = rows[names_index][4]
    found = []
    for name, _, flags, _, offset, size, *_ in rows:
        end = data.index(b"\0", names + name)
        found.append(Section(data[names + name : end].decode(), offset, size, flags))
    return found


def containers(data: bytes, section: Section) -> Iterator[list[Entry]]:
    """Yield the entries of each container in a section of GPU code."""
    at = section.offset
    while at + 16 <= section.offset + section.size:
        magic, _, header, body = struct.unpack_from("<IHHQ", data, at)
        if magic != FATBIN:
            at += 8  # padding between containers
            continue
        entry, end = at + header, at + header + body
        entries = []
        while entry + 64 <= end:
            kind, _, own_header, size = struct.unpack_from("<HHIQ", data, entry)
            (arch,) = struct.unpack_from("<I", data, entry + 28)
            entries.append(Entry(kind, arch, entry + own_header, size))
            entry += own_header + size
        yield entries
        at = end


def slim(data: bytearray) -> int:
    """Set to zero what is not needed, in place, and return how many bytes that were.

    A container without code for the architecture stays whole.
    """
    whole = bytes(data)
    cleared = 0
    for section in elf_sections(whole):
        if section.name in (".nv_fatbin", "__nv_relfatbin"):
            for entries in containers(whole, section):
                if not any((e.kind, e.arch) == (MACHINE_CODE, ARCH) for e in entries):
                    continue
                for kind, arch, offset, size in entries:
                    if (kind, arch) != (MACHINE_CODE, ARCH):
                        data[offset : offset + size] = bytes(size)
                        cleared += size
        elif (
            section.name in (".symtab", ".strtab", ".debug_info", ".comment")
            and not section.flags & LOADED
        ):
            data[section.offset : section.offset + section.size] = bytes(section.size)
            cleared += section.size
    return cleared


def is_wanted(name: str) -> bool:
    """Return whether a file of a wheel goes along."""
    parts = name.split("/")
    if (
        name.endswith(("/", ".c", ".pyx", ".cpp", ".h"))
        or ".data/" in name
        or "/tests/" in name
    ):
        return False
    if "cpython-" in name and "cpython-312-" not in name:
        return False
    if parts[:2] == ["nvidia", "dali"]:
        return parts[2] != "include"
    if parts[:2] == [
        "nvidia",
        "nvimgcodec",
    ]:  # DALI loads the library alone, not the Python module
        is_codec = parts[2] == "extensions" and parts[-1].split(".")[0] in CODECS
        return is_codec or parts[-1].startswith("libnvimgcodec.so")
    if parts[0] == "nvidia":
        return parts[-1].startswith("libnvjpeg.so")
    return True


def unpack(wheels: Path, site: Path) -> tuple[int, int]:
    """Write the wanted files of all wheels, and return their bytes and how many of these are cleared."""
    total = cleared = 0
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in filter(is_wanted, archive.namelist()):
                data = bytearray(archive.read(name))
                if ".so" in name:
                    cleared += slim(data)
                path = site / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                total += len(data)
    # It is found first, and joins the parts of `nvidia` that the machine has itself, with an __init__ or without one.
    (site / "nvidia/__init__.py").write_text(
        "__path__ = __import__('pkgutil').extend_path(__path__, __name__)\n"
    )
    return total, cleared


if __name__ == "__main__":
    total, cleared = unpack(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"{total >> 20} MiB unpacked, of which {cleared >> 20} MiB are cleared")  # noqa: T201
