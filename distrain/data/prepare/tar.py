"""The files of a tar archive, and where their bytes lie in it.

Nothing is unpacked: a walk over the headers finds where each member's bytes lie, and reads are ranges of the archive.
Names of members are labels for a person and never paths to write to. Still, those that a person would not
expect (absolute, with `..`, links, devices, sparse files) are refused.
"""

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from distrain.data.prepare.source import (
    FILE_LIMIT,
    PATIENCE,
    Block,
    FileReader,
    Refused,
    Source,
)
from distrain.data.storage.store import Store
from distrain.errors import UserError

LABELS = {"cls", "json"}
"""Endings of members that may be a label: their text is read along."""
_BLOCK = 512
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
# A header is read by itself where that costs a system call, with all behind it where it costs a request.
_NEAR, _FAR = 4 << 10, 8 << 20
# No header, nor a long name or extension of one, is larger.
_HEADER_LIMIT = 1 << 20
_LABEL_LIMIT = 1 << 16
# What tarfile raises on damaged or hostile headers.
_BROKEN = (tarfile.TarError, ValueError, OverflowError, RecursionError)


class Member(NamedTuple):
    """A file in an archive, and where its bytes lie."""

    name: str
    start: int
    size: int
    text: bytes = b""
    """Its content, where it may be a label."""


class _Range:
    """Bytes start to end of a file, for tarfile, with reading ahead."""

    def __init__(self, store: Store, path: str, start: int, end: int) -> None:
        self._store, self._path, self._start, self._end = store, path, start, end
        self._ahead = _FAR if store.local is None else _NEAR
        self._at, self._kept, self._kept_at = start, b"", start

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (self._start, self._at, self._end)[whence]
        return self.tell()

    def tell(self) -> int:
        return self._at - self._start

    def read(self, n: int = -1) -> bytes:
        n = max(0, min(n if n >= 0 else self._end, self._end - self._at))
        if n > _HEADER_LIMIT:
            raise tarfile.ReadError(f"a header of {n} bytes")
        at = self._at - self._kept_at
        if not 0 <= at <= at + n <= len(self._kept):
            end = min(self._at + max(n, self._ahead), self._end)
            self._kept, self._kept_at, at = (
                self._store.read(self._path, self._at, end, patience=PATIENCE),
                self._at,
                0,
            )
        self._at += n
        return self._kept[at : at + n]


def members(
    store: Store, path: str, start: int = 0, end: int | None = None
) -> Iterator[Member | Refused]:
    """The files of an archive that is bytes start to end of a file.

    Raises:
        OSError: it cannot be read.
        UserError: it is no tar, compressed, or damaged.
    """
    end = store.size(path) if end is None else end
    where, file = f"{store.name}/{path}", _Range(store, path, start, end)
    try:
        tar = tarfile.open(fileobj=file, mode="r:", errorlevel=2)  # type: ignore[call-overload] # noqa: SIM115
    except _BROKEN as error:
        file.seek(0)
        first = file.read(6)
        packed = next(
            (name for magic, name in _COMPRESSED.items() if first.startswith(magic)),
            None,
        )
        how = f"is compressed ({packed}): unpack it to a plain tar, so that it can be read in any order"
        raise UserError(
            f"{where} {how if packed else f'is no tar archive ({error})'}"
        ) from None
    try:
        at = -1
        while (info := _next(tar)) is not None:
            tar.members.clear()  # or a million of them would be kept
            if info.size < 0 or tar.offset <= at:
                raise tarfile.ReadError(f"{info.name} has {info.size} bytes")
            at = tar.offset
            found = _judged(info, start)
            if isinstance(found, Member) and found.start + found.size > end:
                raise tarfile.ReadError(f"it ends inside {found.name}")
            if (
                isinstance(found, Member)
                and found.size <= _LABEL_LIMIT
                and ending_of(found.name) in LABELS
            ):
                file.seek(info.offset_data)
                found = found._replace(text=file.read(info.size))
            if found is not None:
                yield found
        file.seek(tar.offset)
        mark = file.read(_BLOCK)
        if len(mark) < _BLOCK or any(
            mark
        ):  # tarfile takes a damaged header, or none, for the end
            raise tarfile.ReadError(f"no header at byte {tar.offset}")
        while more := file.read(_HEADER_LIMIT):
            if more.strip(b"\0"):
                raise tarfile.ReadError(
                    f"there is data after its end at byte {tar.offset}"
                )
    except tarfile.TarError as error:
        raise UserError(
            f"{where} is cut or damaged ({error}): fetch it again"
        ) from None


def ending_of(name: str) -> str:
    """Return the part of a file's name after its first dot, in lower case."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    """The next member. Raises TarError, whatever tarfile says of what it cannot read."""
    try:
        return tar.next()
    except (ValueError, OverflowError, RecursionError) as error:
        raise tarfile.ReadError(f"{type(error).__name__}: {error}") from None


def _judged(info: tarfile.TarInfo, start: int) -> Member | Refused | None:
    """A member as a file that may be read; None: a folder."""
    name, path = (
        info.name.encode("utf-8", "backslashreplace").decode(),
        PurePosixPath(info.name),
    )
    if info.isdir():
        return None
    if path.is_absolute() or ".." in path.parts:
        return Refused(name, "its name leads out of the archive")
    if info.issym() or info.islnk():
        return Refused(name, "a link")
    if not info.isreg():
        return Refused(name, "a device, or something else that is no file")
    if info.sparse is not None:
        return Refused(name, "a sparse file")
    return Member(name, start + info.offset_data, info.size)


def as_block(path: str, member: Member, label: int) -> Block | Refused:
    """Make a member an image of a source, or say why it cannot be one."""
    name = f"{path}/{member.name}"
    if not member.size:
        return Refused(name, "no bytes")
    if member.size > FILE_LIMIT:
        return Refused(name, f"{member.size} bytes are over the limit of {FILE_LIMIT}")
    return Block(path, name, label, member.start, member.size)


def first_member(store: Store, path: str) -> str:
    """The name of the first file in an archive, or nothing. Raises OSError and UserError."""
    return next(
        (member.name for member in members(store, path) if isinstance(member, Member)),
        "",
    )


def source_of(
    store: Store,
    kind: str,
    classes: Sequence[str],
    found: Sequence[Block | Refused],
    refused: Sequence[Refused] = (),
) -> Source:
    """A source of what was found in archives."""
    blocks = [one for one in found if isinstance(one, Block)]
    left_out = [*refused, *(one for one in found if isinstance(one, Refused))]
    return Source(store, kind, tuple(classes), blocks, FileReader(store.url), left_out)
