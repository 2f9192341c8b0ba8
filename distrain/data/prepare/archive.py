"""Tar archives as a source of images: WebDataset shards, and the archives of ILSVRC-2012.

Nothing is unpacked: a walk over the headers finds where each member's bytes lie, and reads are ranges of the archive.
Names of members are labels for a person and never paths to write to; all the same, those that a person would not
expect (absolute, with `..`, links, devices, sparse files) are refused.
"""

import json
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import NamedTuple

from distrain.data.prepare.hub import numbered
from distrain.data.prepare.source import FILE_LIMIT, PATIENCE, Block, FileReader, Refused, Source
from distrain.data.storage.backend import Entry
from distrain.data.storage.store import Store
from distrain.errors import UserError

IMAGES = {"jpg", "jpeg", "png", "webp"}
LABELS = {"cls", "json"}
_JSON_KEYS = ("label", "cls")
_BLOCK = 512
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# A header is read by itself where that costs a system call, with all behind it where it costs a request.
_NEAR, _FAR = 4 << 10, 8 << 20
# No header, nor a long name or extension of one, is larger.
_HEADER_LIMIT = 1 << 20
_LABEL_LIMIT = 1 << 16
_AT_ONCE = 16
# What tarfile raises on damaged or hostile headers.
_BROKEN = (tarfile.TarError, ValueError, OverflowError, RecursionError)


class Member(NamedTuple):
    """A file in an archive, and where its bytes lie."""

    name: str
    start: int
    size: int
    text: bytes = b""
    """What is in it, where it may be a label."""


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
            self._kept, self._kept_at, at = self._store.read(self._path, self._at, end, patience=PATIENCE), self._at, 0
        self._at += n
        return self._kept[at : at + n]


def members(store: Store, path: str, start: int = 0, end: int | None = None) -> Iterator[Member | Refused]:
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
        packed = next((name for magic, name in _COMPRESSED.items() if first.startswith(magic)), None)
        how = f"is compressed ({packed}): unpack it to a plain tar, so that it can be read in any order"
        raise UserError(f"{where} {how if packed else f'is no tar archive ({error})'}") from None
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
            if isinstance(found, Member) and found.size <= _LABEL_LIMIT and _ending(found.name) in LABELS:
                file.seek(info.offset_data)
                found = found._replace(text=file.read(info.size))
            if found is not None:
                yield found
        file.seek(tar.offset)
        mark = file.read(_BLOCK)
        if len(mark) < _BLOCK or any(mark):  # tarfile takes a damaged header, or none, for the end
            raise tarfile.ReadError(f"no header at byte {tar.offset}")
        while more := file.read(_HEADER_LIMIT):
            if more.strip(b"\0"):
                raise tarfile.ReadError(f"it goes on behind its end at byte {tar.offset}")
    except tarfile.TarError as error:
        raise UserError(f"{where} is cut or damaged ({error}): fetch it again") from None


def _ending(name: str) -> str:
    """What stands behind the first dot of a file's name, in lower case."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    """The next member. Raises TarError, whatever tarfile says of what it cannot read."""
    try:
        return tar.next()
    except (ValueError, OverflowError, RecursionError) as error:
        raise tarfile.ReadError(f"{type(error).__name__}: {error}") from None


def _judged(info: tarfile.TarInfo, start: int) -> Member | Refused | None:
    """A member as a file that may be read; None: a folder."""
    name, path = info.name.encode("utf-8", "backslashreplace").decode(), PurePosixPath(info.name)
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


def _as_block(path: str, member: Member, label: int) -> Block | Refused:
    name = f"{path}/{member.name}"
    if not member.size:
        return Refused(name, "no bytes")
    if member.size > FILE_LIMIT:
        return Refused(name, f"{member.size} bytes are over the limit of {FILE_LIMIT}")
    return Block(path, name, label, member.start, member.size)


def first_member(store: Store, path: str) -> str:
    """The name of the first file in an archive, or nothing. Raises OSError and UserError."""
    return next((member.name for member in members(store, path) if isinstance(member, Member)), "")


def _source(
    store: Store, kind: str, classes: Sequence[str], found: Sequence[Block | Refused], refused: Sequence[Refused] = ()
) -> Source:
    blocks = [one for one in found if isinstance(one, Block)]
    left_out = [*refused, *(one for one in found if isinstance(one, Refused))]
    return Source(store, kind, tuple(classes), blocks, FileReader(store.url), left_out)


# --- ILSVRC-2012


def open_tar_of_tars(store: Store, path: str) -> Source:
    """`ILSVRC2012_img_train.tar`: an archive of one archive a class, named after its synset.

    Raises:
        OSError: it cannot be read.
        UserError: it is damaged.
    """
    outer, refused = list[Member](), list[Refused]()
    for member in members(store, path):
        if isinstance(member, Refused) or not member.name.endswith(".tar"):
            refused.append(Refused(f"{path}/{member.name}", getattr(member, "reason", "no archive of a class")))
        else:
            outer.append(member)
    outer.sort(key=lambda member: member.name)
    classes = [PurePosixPath(member.name).stem for member in outer]

    def inner(label: int) -> list[Block | Refused]:
        at = outer[label]
        place, found = f"{path}/{at.name}", list[Block | Refused]()
        for member in members(store, path, at.start, at.start + at.size):
            if isinstance(member, Refused):
                found.append(Refused(f"{place}/{member.name}", member.reason))
            else:
                block = _as_block(path, member, label)
                found.append(block._replace(name=f"{place}/{member.name}"))
        return found

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        blocks = [block for found in pool.map(inner, range(len(outer))) for block in found]
    return _source(store, "archive of archives", classes, blocks, refused)


def open_labelled(store: Store, path: str, labels: Sequence[str], classes: Sequence[str] | None) -> Source:
    """`ILSVRC2012_img_val.tar`: an archive of images whose labels are in a list.

    Args:
        store: where the archive is.
        path: the archive.
        labels: a synset for each file in the order of file names, or lines of file name and synset.
        classes: all synsets; by default those of the list.

    Raises:
        OSError: it cannot be read.
        UserError: list and archive do not go together.
    """
    found = list(members(store, path))
    files = sorted((one for one in found if isinstance(one, Member)), key=lambda member: member.name)
    refused = [Refused(f"{path}/{one.name}", one.reason) for one in found if isinstance(one, Refused)]
    pairs = [line.replace(",", " ").split() for line in labels if line.strip()]
    if pairs and pairs[0][0].lower() in ("imageid", "filename", "file"):  # a table's head
        pairs = pairs[1:]
    if all(len(pair) == 1 for pair in pairs):
        if len(pairs) != len(files):
            raise UserError(f"the list has {len(pairs)} labels for {len(files)} files in {store.name}/{path}")
        by_name = {file.name: pair[0] for file, pair in zip(files, pairs, strict=True)}
    else:
        known = {pair[0]: pair[1] for pair in pairs if len(pair) > 1}
        stems: dict[str, set[str]] = {}
        for name, label in known.items():
            stems.setdefault(PurePosixPath(name).stem, set()).add(label)
        by_name = {}
        for file in files:
            label_of = {known[file.name]} if file.name in known else stems.get(PurePosixPath(file.name).stem, set())
            if len(label_of) == 1:
                by_name[file.name] = next(iter(label_of))
    classes = sorted(set(by_name.values())) if classes is None else classes
    number = {name: i for i, name in enumerate(classes)}
    blocks = [
        _as_block(path, file, number[by_name[file.name]])
        if by_name.get(file.name) in number
        else Refused(f"{path}/{file.name}", "the list has no label for it")
        for file in files
    ]
    return _source(store, "labelled archive", classes, blocks, refused)


# --- WebDataset


def open_webdataset(store: Store, files: Sequence[Entry]) -> Source:
    """WebDataset shards: members of one name and several endings, one after another, are a sample.

    Images end in .jpg, .jpeg, .png or .webp, labels in .cls (a number) or .json (a number under `label` or `cls`).

    Raises:
        OSError: they cannot be read.
        UserError: one is damaged, or no shard holds labelled images.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = [one for ones in pool.map(lambda file: list(_samples(store, file.name)), files) for one in ones]
    labels = [one.label for one in found if isinstance(one, Block)]
    if not labels:
        reasons = "; ".join(f"{one.name}: {one.reason}" for one in found[:1] if isinstance(one, Refused))
        raise UserError(
            f"{store.name} holds no labelled images as WebDataset writes them, such as 0001.jpg beside 0001.cls"
            + (f" ({reasons})" if reasons else "")
        )
    return _source(store, "WebDataset", numbered(max(labels) + 1, store), found)


def _samples(store: Store, path: str) -> Iterator[Block | Refused]:
    key, parts, odd = "", dict[str, Member](), list[Member]()
    for member in members(store, path):
        if isinstance(member, Refused):
            yield Refused(f"{path}/{member.name}", member.reason)
            continue
        ending = _ending(member.name)
        if (here := member.name[: len(member.name) - len(ending)]) != key:
            yield from _sample(path, key, parts, odd)
            key, parts, odd = here, {}, []
        if ending in parts:
            yield Refused(f"{path}/{member.name}", "a second file of one sample and kind")
        elif ending in IMAGES | LABELS:
            parts[ending] = member
        elif ending.rpartition(".")[2] in IMAGES:
            odd.append(member)
    yield from _sample(path, key, parts, odd)


def _sample(path: str, key: str, parts: dict[str, Member], odd: Sequence[Member]) -> Iterator[Block | Refused]:
    """At most one block, of the parts of a sample by their endings."""
    images = [parts[kind] for kind in parts if kind in IMAGES]
    if not images:  # such as photo.v2.jpg: WebDataset's key ends at the first dot
        yield from (Refused(f"{path}/{member.name}", "more than one dot in its name") for member in odd)
    name = f"{path}/{images[0].name if images else key}"
    if not parts:
        return
    if len(images) != 1:
        yield Refused(name, f"{len(images)} images in one sample")
        return
    label = _label(parts)
    yield label._replace(name=name) if isinstance(label, Refused) else _as_block(path, images[0], label)


def _label(parts: dict[str, Member]) -> int | Refused:
    for kind in ("cls", "json"):
        if kind not in parts:
            continue
        try:
            if kind == "cls":
                return _natural(int(parts[kind].text))
            tree = json.loads(parts[kind].text)
            label = next(tree[name] for name in _JSON_KEYS if name in tree)
            if int(label) != float(label):
                raise ValueError(label)
            return _natural(int(label))
        except (ValueError, TypeError, OverflowError, RecursionError, StopIteration, AttributeError):
            return Refused("", f"its .{kind} holds no label")
    return Refused("", "no label")


def _natural(number: int) -> int:
    if not 0 <= number < 1 << 31:
        raise ValueError(number)
    return number
