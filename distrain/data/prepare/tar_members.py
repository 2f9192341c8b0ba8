"""List the files of a tar archive with the byte ranges of their contents.

Nothing is unpacked: a walk over the headers finds the byte range of each member, and
reads are ranges of the archive. Names of members are only displayed, never used as
paths to write to. Still, members that a user would not expect (absolute names, names
with `..`, links, devices, sparse files) are rejected.
"""

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from distrain.data.decoding.file_formats import name_stand_in
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

LABEL_EXTENSIONS = ("cls", "label", "class", "json")
"""Extensions of members that may be a label; their text is read during the walk."""
_TAR_BLOCK_BYTES = 512
# First bytes of archives that only have the name of a tar.
_COMPRESSION_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "rar",
}
# Members of incremental and multi-volume archives that hold no file: the names in a
# folder, the label of a volume.
_NO_FILE_TYPES = (b"D", b"V")
# On a disk, where a read is a system call, a header is read by itself; on a remote
# store, where it is a request, together with what follows.
_LOCAL_READ_BYTES = 4 << 10
_REMOTE_READ_BYTES = 8 << 20
# Limit of a header, and of a long name or an extension of one.
_MAX_HEADER_BYTES = 1 << 20
_MAX_LABEL_BYTES = 1 << 16
# What stands in the place of an archive is told by its first bytes.
_STAND_IN_BYTES = 1 << 10
# Exceptions of tarfile on damaged or hostile headers.
_TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError)


class TarMember(NamedTuple):
    """File in an archive, and the byte range of its content."""

    name: str
    start: int
    num_bytes: int
    label_data: bytes = b""
    """Content of the file, if it may be a label."""


class _TarInfo(tarfile.TarInfo):
    """Header of a member, with the name that GNU tar means.

    tarfile puts the prefix of a header before its name in every format. In GNU tar's
    own format there is none: `tar --listed-incremental` writes times there.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_TarInfo":
        """Read a header of 512 bytes."""
        info = super().frombuf(buf, encoding, errors)
        if buf[257:265] == tarfile.GNU_MAGIC and buf[345] != 0:
            prefix = buf[345:500].partition(b"\0")[0].decode(encoding, errors)
            info.name = info.name.removeprefix(f"{prefix}/")
        return info


class _BufferedRangeFile:
    """Bytes start to end of a file as a file object for tarfile, with read-ahead."""

    def __init__(self, store: Store, path: str, start: int, end: int) -> None:
        self._store = store
        self._path = path
        self._start = start
        self._end = end
        self._read_ahead_bytes = (
            _REMOTE_READ_BYTES if store.local_path is None else _LOCAL_READ_BYTES
        )
        # Positions are offsets in the whole file; `tell` is relative to the start.
        self._position = start
        self._buffer = b""
        self._buffer_start = start

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (self._start, self._position, self._end)[whence]
        return self.tell()

    def tell(self) -> int:
        return self._position - self._start

    def read(self, n: int = -1) -> bytes:
        n = max(0, min(n if n >= 0 else self._end, self._end - self._position))
        # tarfile would allocate whatever a hostile header claims.
        if n > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {n} bytes")
        offset = self._position - self._buffer_start
        if not 0 <= offset <= offset + n <= len(self._buffer):
            end = min(self._position + max(n, self._read_ahead_bytes), self._end)
            self._buffer = self._store.read(
                self._path, self._position, end, retry_seconds=RETRY_SECONDS
            )
            self._buffer_start = self._position
            offset = 0
        self._position += n
        return self._buffer[offset : offset + n]


def iter_members(
    store: Store, path: str, start: int = 0, end: int | None = None
) -> Iterator[TarMember | Reject]:
    """Yield the files of an archive that is bytes start to end of a file.

    Raises:
        OSError: the file cannot be read.
        UserError: it is not a tar archive, is compressed, or is damaged.
    """
    end = store.get_size(path) if end is None else end
    location = f"{store.redacted_url}/{path}"
    file = _BufferedRangeFile(store, path, start, end)
    tar = _open_tar(file, location)
    try:
        previous_offset = -1
        while (info := _read_next_header(tar)) is not None:
            # tarfile keeps every member it has read, which may be millions.
            tar.members.clear()  # type: ignore[attr-defined]
            # A negative size leads back to an earlier header: the walk would not end.
            if info.size < 0 or tar.offset <= previous_offset:
                raise tarfile.ReadError(f"{info.name} has {info.size} bytes")
            previous_offset = tar.offset

            member = _check_member(info, start)
            if isinstance(member, TarMember):
                if member.start + member.num_bytes > end:
                    raise tarfile.ReadError(f"it ends inside {member.name}")
                if _may_be_label(member):
                    file.seek(info.offset_data)
                    member = member._replace(label_data=file.read(info.size))
            if member is not None:
                yield member
        _check_end(tar, file, location)
    except tarfile.TarError as error:
        raise UserError(
            f"{location} is truncated or damaged ({error}): download it again"
        ) from None


def _open_tar(file: _BufferedRangeFile, location: str) -> tarfile.TarFile:
    """Read the first header. Raises UserError if the file is not a plain tar."""
    try:
        return tarfile.open(fileobj=file, mode="r:", tarinfo=_TarInfo, errorlevel=2)  # type: ignore[call-overload, no-any-return]
    except _TAR_ERRORS as error:
        file.seek(0)
        first_bytes = file.read(6)
        for magic, compression in _COMPRESSION_MAGIC.items():
            if first_bytes.startswith(magic):
                raise UserError(
                    f"{location} is compressed ({compression}): unpack it to a plain "
                    "tar archive, so that it can be read in any order"
                ) from None
        file.seek(0)
        stand_in = name_stand_in(file.read(_STAND_IN_BYTES))
        problem = f", but {stand_in}" if stand_in else f" ({error}): download it again"
        raise UserError(f"{location} is not a tar archive{problem}") from None


def _read_next_header(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    """Read the next header; None at the end. Raises TarError only, unlike tarfile."""
    try:
        return tar.next()
    except (ValueError, OverflowError, RecursionError) as error:
        raise tarfile.ReadError(f"{type(error).__name__}: {error}") from None


def _check_end(tar: tarfile.TarFile, file: _BufferedRangeFile, location: str) -> None:
    """Check that the archive has an end mark, and that only zeros follow it.

    Raises:
        ReadError: it has no end mark.
        UserError: there is data after it.
    """
    # tarfile takes a damaged or missing header for the end of the archive.
    file.seek(tar.offset)
    end_mark = file.read(_TAR_BLOCK_BYTES)
    if len(end_mark) < _TAR_BLOCK_BYTES or any(end_mark):
        raise tarfile.ReadError(f"no header at byte {tar.offset}")
    # Images in a second, appended archive would be lost silently.
    while padding := file.read(_MAX_HEADER_BYTES):
        if padding.strip(b"\0"):
            raise UserError(
                f"{location} has data after its end mark at byte {tar.offset}: if cat "
                "joined archives, join them with tar --concatenate; if not, download "
                "it again"
            )


def get_extension(name: str) -> str:
    """Return the part of a file name after its first dot, in lowercase."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def _may_be_label(member: TarMember) -> bool:
    is_label_file = get_extension(member.name) in LABEL_EXTENSIONS
    return is_label_file and member.num_bytes <= _MAX_LABEL_BYTES


def _check_member(
    info: tarfile.TarInfo, archive_start: int
) -> TarMember | Reject | None:
    """Return a member as a readable file, or why it is not one; None for no file."""
    # A name may be any bytes, and rejects are written as UTF-8.
    name = info.name.encode("utf-8", "backslashreplace").decode()
    path = PurePosixPath(info.name)
    if info.isdir() or info.type in _NO_FILE_TYPES:
        return None
    if path.is_absolute() or ".." in path.parts:
        return Reject(name, "its name leads out of the archive")
    if info.issym():
        return Reject(name, "a link: archive it again with tar --dereference")
    if info.islnk():
        return Reject(name, "a link: archive it again with tar --hard-dereference")
    if not info.isreg():
        return Reject(name, "a device or another special file")
    # The bytes of a sparse file are not one range of the archive.
    if info.sparse is not None:
        return Reject(name, "a sparse file")
    return TarMember(name, archive_start + info.offset_data, info.size)


def to_block(path: str, member: TarMember, label: int) -> Block | Reject:
    """Return a member as a block, or why it cannot be an image."""
    name = f"{path}/{member.name}"
    if not member.num_bytes:
        return Reject(name, "no bytes")
    if member.num_bytes > MAX_FILE_BYTES:
        reason = f"{member.num_bytes} bytes are over the limit of {MAX_FILE_BYTES}"
        return Reject(name, reason)
    return Block(path, name, label, member.start, member.num_bytes)


def build_tar_source(
    store: Store,
    format_name: str,
    classes: Sequence[str],
    blocks_and_rejects: Sequence[Block | Reject],
    rejects: Sequence[Reject] = (),
    notes: Sequence[str] = (),
) -> ImageSource:
    """Build a source from the blocks of archives, and move their rejects to its list.

    Args:
        store: where the archives are.
        format_name: name of the layout, for messages.
        classes: class names by label.
        blocks_and_rejects: blocks, with the members that cannot be one.
        rejects: further rejects, listed first.
        notes: what the user should know, one sentence each.
    """
    blocks = [item for item in blocks_and_rejects if isinstance(item, Block)]
    bad_members = [item for item in blocks_and_rejects if isinstance(item, Reject)]
    reader = FileReader(store.url)
    return ImageSource(
        store,
        format_name,
        tuple(classes),
        blocks,
        reader,
        [*rejects, *bad_members],
        notes=list(notes),
    )
