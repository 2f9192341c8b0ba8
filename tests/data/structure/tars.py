"""Random tars of WebDataset samples and of class folders, read by tarfile."""

import io
import json
import posixpath
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st
from structure.common import (
    IMAGE_SUFFIXES,
    JUNK,
    OTHER_SUFFIXES,
    RARE_SUFFIXES,
    Found,
    Kind,
    Reading,
    Refusal,
    count_other_files,
    escape,
    get_suffix,
    is_image_name,
    is_junk_path,
    is_usual_image_name,
    label_data,
    make_pool,
)
from structure.folders import SPLITS

LABEL_SUFFIXES = ("cls", "label", "class", "json")
_NUMBERS = ("0", "1", "2", "3", "10", "-1", " 2\n", "2.0", "\ufeff1", "1.5", "")
_NAMES = ("cat", "dog", "golden retriever", "golden eagle", "\u00e9", "no\x00name", "")
_KEYS = ("0", "1", "2", "3", "a b", "\u00e9", "e\u0301", "b\udcfe", "q'", "n" * 120)
_FOLDERS = ("cat", "dog", "a b", "caf\u00e9", "y.parquet")


class Member(NamedTuple):
    """Member of an archive."""

    name: str
    data: bytes | int
    """Its content; a number: a file of the pool."""
    type: bytes = tarfile.REGTYPE


class Files(NamedTuple):
    """Files of an archive that are no junk, by name, and what is no file."""

    data_by_name: dict[str, bytes]
    rejects: list[str]


def make_tar(members: list[Member], tar_format: int = tarfile.GNU_FORMAT) -> bytes:
    """Pack members in their order."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tar_format) as tar:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.type = member.type
            data = member.data
            if isinstance(data, int):
                data = make_pool()[data]
            if info.isreg():
                info.size = len(data)
            else:
                info.linkname = "0.jpg"
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def list_files(data: bytes, location: str) -> Files:
    """Read an archive whole: the last member of a name counts, junk does not."""
    by_name: dict[str, tuple[str, bytes | None]] = {}
    rejects: list[str] = []
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for info in tar.getmembers():
            if info.isdir():
                continue
            name = posixpath.normpath(info.name)
            file = tar.extractfile(info) if info.isreg() else None
            if name in by_name and not is_junk_path(name):
                rejects.append(f"{location}/{escape(by_name[name][0])}")
            outside = name.startswith(("/", "../"))
            is_good = file is not None and not outside
            by_name[name] = (info.name, file.read() if file and is_good else None)

    # Folders around everything came with the archive, hidden or not.
    folders = [posixpath.dirname(name).split("/") for name in by_name]
    common = posixpath.commonprefix([[*parts, ""] for parts in folders])
    found: dict[str, bytes] = {}
    for name, (stored_name, content) in by_name.items():
        if is_junk_path("/".join(name.split("/")[len([p for p in common if p]) :])):
            continue
        if content is None:
            rejects.append(f"{location}/{escape(stored_name)}")
        else:
            found[escape(stored_name)] = content
    return Files(found, rejects)


@st.composite
def _odd_members(draw: st.DrawFn) -> Member:
    """Junk, notes, links and the like."""
    kind = draw(st.sampled_from(("junk", "junk", "inside", "note", "link", "away")))
    image = draw(st.integers(0, 39))
    if kind == "junk":
        folder = draw(st.sampled_from(("", "cat/", "a/b/")))
        return Member(folder + draw(st.sampled_from(JUNK)), image)
    if kind == "inside":
        return Member(f"{draw(st.sampled_from(JUNK[9:15]))}/cat/9.jpg", image)
    if kind == "note":
        return Member(draw(st.sampled_from(("README", "cat/notes.txt"))), b"notes")
    if kind == "away":
        return Member(draw(st.sampled_from(("../0.jpg", "/8.jpg"))), image)
    types = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    return Member("cat/7.jpg", b"", draw(st.sampled_from(types)))


@st.composite
def _labels(draw: st.DrawFn, values: tuple[str, ...]) -> tuple[str, bytes]:
    """Suffix and content of a label."""
    suffix = draw(st.sampled_from(LABEL_SUFFIXES))
    text = draw(st.sampled_from(values))
    if suffix != "json":
        return suffix, text.encode()
    key = draw(st.sampled_from(("label", "cls", "class", "target", "caption")))
    value: Any = text
    if draw(st.booleans()):
        try:
            value = int(text)
        except ValueError:
            value = text
    return suffix, json.dumps({"n": 7, key: value}).encode()


@st.composite
def sample_cases(draw: st.DrawFn) -> list[list[Member]]:
    """Members of one or several shards of samples, in any order."""
    values = draw(st.sampled_from((_NUMBERS, _NUMBERS, _NAMES, _NUMBERS + _NAMES)))
    if draw(st.integers(0, 3)):
        values = draw(st.sampled_from((_NUMBERS[:5], _NAMES[:2])))
    shards: list[list[Member]] = []
    for _ in range(draw(st.sampled_from((1, 1, 2)))):
        members = draw(st.lists(_odd_members(), max_size=2))
        folder = draw(st.sampled_from(("", "./", "x/", "a.b/")))
        for key in draw(st.lists(st.sampled_from(_KEYS), min_size=2, max_size=6)):
            image = draw(st.integers(0, 39))
            suffix = draw(st.sampled_from(("jpg", "jpg", *IMAGE_SUFFIXES, "avif")))
            shape = draw(st.integers(0, 15))
            if shape:
                members.append(Member(f"{folder}{key}.{suffix}", image))
            if shape != 1:
                label, data = draw(_labels(values))
                members.append(Member(f"{folder}{key}.{label}", data))
            if shape == 2:
                other = draw(
                    st.sampled_from(("left.jpg", "txt", "pyd", "png", *RARE_SUFFIXES))
                )
                members.append(Member(f"{folder}{key}.{other}", image))
            if shape == 3:
                members.append(Member(f"{folder}{key}.{suffix}", b""))
        shards.append(draw(st.permutations(members)))
    return shards


@st.composite
def class_folder_cases(draw: st.DrawFn) -> list[list[Member]]:
    """Members of tars of class folders."""
    pool = tuple(SPLITS) if not draw(st.integers(0, 7)) else _FOLDERS
    classes = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=3, unique=True))
    root = draw(st.sampled_from(("", "./", "photos/", "a/b/", ".cache/")))
    inner = st.sampled_from(("", "", "", "deep/", "a.jpg/", "train/", "test/"))
    suffixes = st.sampled_from((*IMAGE_SUFFIXES * 2, *OTHER_SUFFIXES, *RARE_SUFFIXES))
    shards: list[list[Member]] = []
    for _ in range(draw(st.sampled_from((1, 1, 2)))):
        members = draw(st.lists(_odd_members(), max_size=2))
        for key in draw(st.lists(st.sampled_from(_KEYS), min_size=1, max_size=7)):
            folder = f"{root}{draw(st.sampled_from(classes))}/{draw(inner)}"
            image = draw(st.integers(0, 39))
            data = image if draw(st.integers(0, 15)) else b""
            members.append(Member(f"{folder}{key}.{draw(suffixes)}", data))
        shards.append(draw(st.permutations(members)))
    return shards


def write_tars(case: list[list[Member]], folder: Path) -> dict[str, Any]:
    """Write each shard; the format alternates."""
    formats = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    for i, members in enumerate(case):
        data = make_tar(members, formats[len(members) % 2])
        (folder / f"s-{i:03d}.tar").write_bytes(data)
    return {"url": str(folder)}


def _split_name(name: str) -> tuple[str, str]:
    """Key and extensions of a member: its name is cut at the first dot."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def _is_known(suffix: str) -> bool:
    """Whether a suffix is that of a label or of a usual image."""
    return suffix in LABEL_SUFFIXES or (
        "." not in suffix and is_usual_image_name("." + suffix)
    )


def _parse_label(suffix: str, data: bytes) -> int | str | None:
    """A number from text or JSON, or a name."""
    try:
        text: Any = data.decode("utf-8-sig")
        tree = json.loads(text) if suffix == "json" else {}
    except ValueError:
        return None
    if suffix == "json":
        keys = [key for key in ("label", "cls", "class", "target") if key in tree]
        if not keys:
            return None
        text = str(tree[keys[0]])
    text = text.strip()
    try:
        number = float(text)
    except ValueError:
        return text if text and text.isprintable() else None
    return int(number) if number.is_integer() else None


def read_tars(case: list[list[Member]], options: dict[str, Any]) -> Reading | Refusal:
    """Read shards of samples, or tars of class folders if no image has a label."""
    root = Path(options["url"])
    files: dict[str, dict[str, bytes]] = {}
    rejects: list[str] = []
    for path in sorted(root.iterdir()):
        listed = list_files(path.read_bytes(), path.name)
        files[path.name] = listed.data_by_name
        rejects += listed.rejects

    images: list[Found] = []
    values: list[int | str] = []
    bad_samples: list[str] = []
    is_labeled = False
    for path_name, data_by_name in files.items():
        by_key: dict[str, list[tuple[str, str]]] = {}
        for name in data_by_name:
            key, suffix = _split_name(name)
            parts = by_key.setdefault(key, [])
            # A second .jpg, as .JPG, is left out.
            if suffix in dict(parts) and _is_known(suffix):
                bad_samples.append(f"{path_name}/{name}")
            elif suffix:
                parts.append((suffix, name))
        for key, parts in by_key.items():
            labels = {
                suffix: name for suffix, name in parts if suffix in LABEL_SUFFIXES
            }
            # Images with further extensions count where there is no usual one.
            usual = [
                name
                for suffix, name in parts
                if _is_known(suffix) and suffix not in LABEL_SUFFIXES
            ]
            other = [
                name
                for suffix, name in parts
                if is_image_name(name) and not _is_known(suffix)
            ]
            is_labeled = is_labeled or bool(labels and (usual or other))
            found = usual or other
            suffix = min(labels, key=LABEL_SUFFIXES.index, default="")
            data = data_by_name[labels[suffix]] if labels else b""
            value = _parse_label(suffix, data) if labels else None
            if not found:
                # A .json alone may describe anything; a label alone is named.
                if labels and not (value is None and list(labels) == ["json"]):
                    bad_samples.append(f"{path_name}/{key}.")
                continue
            names = [f"{path_name}/{name}" for name in found]
            if len(found) > 1 or value is None or not data_by_name[found[0]]:
                bad_samples += names
                continue
            content = label_data(data_by_name[found[0]])
            images.append(Found(names[0], str(value), content))
            values.append(value)

    if not is_labeled:
        return _read_class_folders(root, files, rejects)
    return _number(root, images, values, rejects + bad_samples)


def _number(
    root: Path, images: list[Found], values: list[int | str], rejects: list[str]
) -> Reading | Refusal:
    """Number the classes of labels that are all numbers, or all names."""
    refusal = Refusal([str(root)])
    known = [value for value in values if isinstance(value, str) or value >= 0]
    if not known or len({type(value) for value in values}) > 1:
        return refusal
    if isinstance(known[0], str):
        classes = tuple(sorted(set(map(str, known))))
    else:
        classes = tuple(str(i) for i in range(max(map(int, known)) + 1))
    if len(classes) < 2:
        return refusal
    kept = [image for image in images if image.class_name in classes]
    lost = [image.name for image in images if image.class_name not in classes]
    return Reading(kept, classes, rejects + lost)


def _read_class_folders(
    root: Path, files: dict[str, dict[str, bytes]], rejects: list[str]
) -> Reading | Refusal:
    """Read folders below those that all images share as classes."""
    refusal = Refusal([str(root)])
    places = {
        (path, name): posixpath.normpath(name).split("/")
        for path, data_by_name in files.items()
        for name in data_by_name
    }
    of_images = [parts for (_, name), parts in places.items() if is_image_name(name)]
    folders = [[*parts[:-1], ""] for parts in of_images]
    common = [part for part in posixpath.commonprefix(folders) if part]
    inside = {
        place: parts[len(common) :]
        for place, parts in places.items()
        if parts[: len(common)] == common and len(parts) > len(common)
    }
    classes = {inside[place][0] for place in inside if is_image_name(place[1])}
    if any(len(inside[place]) < 2 for place in inside if is_image_name(place[1])):
        return refusal
    if len(classes) < 2 or classes <= set(SPLITS):
        return refusal
    splits: dict[str, set[str]] = {name: set() for name in classes}
    images: list[Found] = []
    others: list[str] = []
    mentions: set[str] = set()
    for (path, name), parts in inside.items():
        if len(parts) < 2:
            continue
        data = files[path][name]
        if parts[0] not in classes:
            mentions.add(parts[0])
            continue
        if len(parts) > 2 and parts[1] in SPLITS and is_image_name(name):
            splits[parts[0]].add(SPLITS[parts[1]])
        if get_suffix(name) in OTHER_SUFFIXES:
            others.append(name)
        elif data:
            images.append(Found(f"{path}/{name}", parts[0], label_data(data)))
        else:
            rejects.append(f"{path}/{name}")
    if not images or any(len(found) > 1 for found in splits.values()):
        return refusal
    counts = count_other_files(others)
    return Reading(images, tuple(sorted(classes)), rejects, list(mentions), counts)


SAMPLES = Kind(sample_cases(), write_tars, read_tars)
CLASS_FOLDER_TARS = Kind(class_folder_cases(), write_tars, read_tars)
