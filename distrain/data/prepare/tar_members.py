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
    MAX_FILE_BYTES,
    RETRY_SECONDS,
    Block,
    FileReader,
    ImageSource,
    Reject,
)
from distrain.data.storage.store import Store
from distrain.errors import UserError

LABEL_EXTENSIONS = {"cls", "json"}
"""Endings of members that may be a label: their text is read along."""
_TAR_BLOCK_BYTES = 512
_COMPRESSION_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
# A header is read by itself where that costs a system call, with all behind it where it costs a request.
_LOCAL_READ_BYTES, _REMOTE_READ_BYTES = 4 << 10, 8 << 20
# No header, nor a long name or extension of one, is larger.
_MAX_HEADER_BYTES = 1 << 20
_MAX_LABEL_BYTES = 1 << 16
# What tarfile raises on damaged or hostile headers.
_TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError)


class TarMember(NamedTuple):
    """A file in an archive, and where its bytes lie."""

    name: str
    start: int
    num_bytes: int
    label_data: bytes = b""
    """Its content, where it may be a label."""


class _BufferedRangeFile:
    """Bytes start to end of a file, for tarfile, with reading ahead."""

    def __init__(self, store: Store, path: str, start: int, end: int) -> None:
        self._store, self._path, self._start, self._end = store, path, start, end
        self._read_ahead_bytes = (
            _REMOTE_READ_BYTES if store.local_path is None else _LOCAL_READ_BYTES
        )
        self._position, self._buffer, self._buffer_start = start, b"", start

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (self._start, self._position, self._end)[whence]
        return self.tell()

    def tell(self) -> int:
        return self._position - self._start

    def read(self, n: int = -1) -> bytes:
        n = max(0, min(n if n >= 0 else self._end, self._end - self._position))
        if n > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {n} bytes")
        at = self._position - self._buffer_start
        if not 0 <= at <= at + n <= len(self._buffer):
            end = min(self._position + max(n, self._read_ahead_bytes), self._end)
            self._buffer, self._buffer_start, at = (
                self._store.read(
                    self._path, self._position, end, retry_seconds=RETRY_SECONDS
                ),
                self._position,
                0,
            )
        self._position += n
        return self._buffer[at : at + n]


def iter_members(
    store: Store, path: str, start: int = 0, end: int | None = None
) -> Iterator[TarMember | Reject]:
    """The files of an archive that is bytes start to end of a file.

    Raises:
        OSError: it cannot be read.
        UserError: it is no tar, compressed, or damaged.
    """
    end = store.get_size(path) if end is None else end
    where, file = (
        f"{store.redacted_url}/{path}",
        _BufferedRangeFile(store, path, start, end),
    )
    try:
        tar = tarfile.open(fileobj=file, mode="r:", errorlevel=2)  # type: ignore[call-overload] # noqa: SIM115
    except _TAR_ERRORS as error:
        file.seek(0)
        first = file.read(6)
        packed = next(
            (
                name
                for magic, name in _COMPRESSION_MAGIC.items()
                if first.startswith(magic)
            ),
            None,
        )
        how = f"is compressed ({packed}): unpack it to a plain tar, so that it can be read in any order"
        raise UserError(
            f"{where} {how if packed else f'is no tar archive ({error})'}"
        ) from None
    try:
        at = -1
        while (info := _read_next_header(tar)) is not None:
            tar.members.clear()  # or a million of them would be kept
            if info.size < 0 or tar.offset <= at:
                raise tarfile.ReadError(f"{info.name} has {info.size} bytes")
            at = tar.offset
            found = _check_member(info, start)
            if isinstance(found, TarMember) and found.start + found.num_bytes > end:
                raise tarfile.ReadError(f"it ends inside {found.name}")
            if (
                isinstance(found, TarMember)
                and found.num_bytes <= _MAX_LABEL_BYTES
                and get_extension(found.name) in LABEL_EXTENSIONS
            ):
                file.seek(info.offset_data)
                found = found._replace(label_data=file.read(info.size))
            if found is not None:
                yield found
        file.seek(tar.offset)
        mark = file.read(_TAR_BLOCK_BYTES)
        if len(mark) < _TAR_BLOCK_BYTES or any(
            mark
        ):  # tarfile takes a damaged header, or none, for the end
            raise tarfile.ReadError(f"no header at byte {tar.offset}")
        while more := file.read(_MAX_HEADER_BYTES):
            if more.strip(b"\0"):
                raise tarfile.ReadError(
                    f"there is data after its end at byte {tar.offset}"
                )
    except tarfile.TarError as error:
        raise UserError(
            f"{where} is cut or damaged ({error}): fetch it again"
        ) from None


def get_extension(name: str) -> str:
    """Return the part of a file's name after its first dot, in lower case."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def _read_next_header(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    """The next member. Raises TarError, whatever tarfile says of what it cannot read."""
    try:
        return tar.next()
    except (ValueError, OverflowError, RecursionError) as error:
        raise tarfile.ReadError(f"{type(error).__name__}: {error}") from None


def _check_member(
    info: tarfile.TarInfo, archive_start: int
) -> TarMember | Reject | None:
    """A member as a file that may be read; None: a folder."""
    name, path = (
        info.name.encode("utf-8", "backslashreplace").decode(),
        PurePosixPath(info.name),
    )
    if info.isdir():
        return None
    if path.is_absolute() or ".." in path.parts:
        return Reject(name, "its name leads out of the archive")
    if info.issym() or info.islnk():
        return Reject(name, "a link")
    if not info.isreg():
        return Reject(name, "a device, or something else that is no file")
    if info.sparse is not None:
        return Reject(name, "a sparse file")
    return TarMember(name, archive_start + info.offset_data, info.size)


def to_block(path: str, member: TarMember, label: int) -> Block | Reject:
    """Make a member an image of a source, or say why it cannot be one."""
    name = f"{path}/{member.name}"
    if not member.num_bytes:
        return Reject(name, "no bytes")
    if member.num_bytes > MAX_FILE_BYTES:
        return Reject(
            name, f"{member.num_bytes} bytes are over the limit of {MAX_FILE_BYTES}"
        )
    return Block(path, name, label, member.start, member.num_bytes)


def find_first_member_name(store: Store, path: str) -> str:
    """The name of the first file in an archive, or nothing. Raises OSError and UserError."""
    return next(
        (
            member.name
            for member in iter_members(store, path)
            if isinstance(member, TarMember)
        ),
        "",
    )


def build_tar_source(
    store: Store,
    format_name: str,
    classes: Sequence[str],
    blocks_and_rejects: Sequence[Block | Reject],
    rejects: Sequence[Reject] = (),
) -> ImageSource:
    """A source of what was found in archives."""
    blocks = [one for one in blocks_and_rejects if isinstance(one, Block)]
    left_out = [
        *rejects,
        *(one for one in blocks_and_rejects if isinstance(one, Reject)),
    ]
    return ImageSource(
        store, format_name, tuple(classes), blocks, FileReader(store.url), left_out
    )
