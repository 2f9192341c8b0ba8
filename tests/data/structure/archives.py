"""Random archives of one archive per class, and archives with a list of labels."""

import csv
import io
import json
import posixpath
import re
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st
from structure.common import (
    IMAGE_SUFFIXES,
    JUNK,
    Found,
    Kind,
    Reading,
    Refusal,
    count_other_files,
    is_image_name,
    label_data,
)
from structure.tars import Member, list_files, make_tar

_SYNSETS = ("n01440764", "n01443537", "cat", "golden retriever", "caf\u00e9", "a.b")
_LABELS = ("cat", "dog", "golden retriever", "golden eagle", "a, b", 'q"', "\u00e9")
_NUMBERS = ("0", "1", "2", "10")
_FILES = ("a b", "0", "1", "2", "10", "\u00e9", "n" * 120, "p-3", "x_4", "q(1)")
_FOLDERS = ("", "", "val/", "a/b/")


class InnerArchive(NamedTuple):
    """Archive of one class."""

    name: str
    members: list[Member]


class Labeled(NamedTuple):
    """Archive of images, and a list of labels."""

    members: list[Member]
    rows: list[tuple[str, str]]
    """File and label of each line."""
    form: str
    stems: bool
    """Whether the list leaves extensions out."""
    header: bool


@st.composite
def nested_cases(draw: st.DrawFn) -> list[InnerArchive | Member]:
    """Archives of classes, with notes and junk beside them."""
    names = draw(st.lists(st.sampled_from(_SYNSETS), min_size=1, max_size=4))
    items: list[InnerArchive | Member] = []
    for name in names:
        members = [
            Member(f"{key}.{draw(st.sampled_from(IMAGE_SUFFIXES))}", number)
            for key, number in draw(
                st.lists(
                    st.tuples(st.sampled_from(_FILES), st.integers(0, 39)), max_size=4
                )
            )
        ]
        if draw(st.booleans()):
            members.append(Member(draw(st.sampled_from(JUNK)), 0))
        if not draw(st.integers(0, 7)):
            members.append(Member("empty.jpg", b""))
        items.append(InnerArchive(f"{name}.tar", members))
    # An archive of archives is one whose first file is an archive.
    odd = st.sampled_from(("README", "._cat.tar", "x.jpg", "Thumbs.db"))
    items += [Member(name, 1) for name in draw(st.lists(odd, max_size=2))]
    return items


def write_nested(case: list[InnerArchive | Member], folder: Path) -> dict[str, Any]:
    """Write the archive of archives."""
    members = [
        item if isinstance(item, Member) else Member(item.name, make_tar(item.members))
        for item in case
    ]
    (folder / "set.tar").write_bytes(make_tar(members))
    return {"url": str(folder / "set.tar")}


def read_nested(
    case: list[InnerArchive | Member], options: dict[str, Any]
) -> Reading | Refusal:
    """Read each inner archive as the class of its name."""
    path = Path(options["url"])
    outer = list_files(path.read_bytes(), path.name)
    rejects = list(outer.rejects)
    images: list[Found] = []
    classes: list[str] = []
    mentions: list[str] = []
    for name, data in sorted(outer.data_by_name.items()):
        if not name.endswith(".tar"):
            rejects.append(f"{path.name}/{name}")
            continue
        location = f"{path.name}/{name}"
        inner = list_files(data, location)
        rejects += inner.rejects
        if not inner.data_by_name:
            mentions.append(name)
            continue
        classes.append(name.removesuffix(".tar"))
        for file, content in inner.data_by_name.items():
            if content:
                data_label = label_data(content)
                images.append(Found(f"{location}/{file}", classes[-1], data_label))
            else:
                rejects.append(f"{location}/{file}")
    if not images or len(classes) < 2:
        return Refusal([path.name])
    return Reading(images, tuple(classes), rejects, mentions)


@st.composite
def labeled_cases(draw: st.DrawFn) -> Labeled:
    """Images in random folders, and a list that has most of them."""
    folder = draw(st.sampled_from(_FOLDERS))
    values = draw(st.sampled_from((_LABELS, _NUMBERS)))[: draw(st.integers(2, 4))]
    keys = draw(st.lists(st.sampled_from(_FILES), min_size=4, unique=True))
    members: list[Member] = []
    rows: list[tuple[str, str]] = []
    for key in keys:
        name = f"{folder}{key}.{draw(st.sampled_from(('jpg', 'JPEG', 'png')))}"
        number = draw(st.integers(0, 39))
        members.append(Member(name, number if draw(st.integers(0, 19)) else b""))
        if draw(st.integers(0, 9)):
            rows.append((name, draw(st.sampled_from(values))))
    odd = st.sampled_from(("._0.jpg", ".DS_Store", f"{folder}notes.txt"))
    members += [Member(name, 1) for name in draw(st.lists(odd, max_size=2))]
    form = draw(st.sampled_from(("csv", "tsv", "semicolon", "json", "lines")))
    return Labeled(
        draw(st.permutations(members)),
        draw(st.permutations(rows)),
        form,
        draw(st.booleans()),
        draw(st.booleans()),
    )


def _name_in_list(case: Labeled, name: str) -> str:
    return posixpath.splitext(name)[0] if case.stems else name


def _format_list(case: Labeled) -> str:
    rows = [(_name_in_list(case, name), label) for name, label in case.rows]
    if case.form == "json":
        return json.dumps(dict(rows))
    if case.form == "lines":
        label_by_name = dict(case.rows)
        images = sorted({m.name for m in case.members if _is_listed(m.name)})
        return "\n".join(label_by_name.get(name, "cat") for name in images)
    sink = io.StringIO()
    delimiter = {"csv": ",", "tsv": "\t", "semicolon": ";"}[case.form]
    writer = csv.writer(sink, delimiter=delimiter)
    writer.writerows([("filename", "label")] if case.header else [])
    writer.writerows(rows)
    return sink.getvalue()


def _is_listed(name: str) -> bool:
    return is_image_name(name) and not name.startswith("._")


def write_labeled(case: Labeled, folder: Path) -> dict[str, Any]:
    """Write the archive and its list."""
    (folder / "val.tar").write_bytes(make_tar(case.members))
    (folder / "labels.txt").write_text(_format_list(case))
    return {"url": str(folder / "val.tar"), "labels_url": str(folder / "labels.txt")}


def read_labeled(case: Labeled, options: dict[str, Any]) -> Reading | Refusal:
    """Give each image the label that the list has for it."""
    path = Path(options["url"])
    files = list_files(path.read_bytes(), path.name)
    names = [name for name in files.data_by_name if is_image_name(name)]
    others = [name for name in files.data_by_name if not is_image_name(name)]
    refusal = Refusal([path.name, "labels.txt"])

    # Look each image up.
    label_by_name = dict(case.rows)
    if case.form == "lines":
        lines = Path(options["labels_url"]).read_text().split("\n")
        # Lines that are all different might be a table without its names of files.
        is_unlike = len(lines) > 2 and len(set(lines)) == len(lines)
        if is_unlike and any(re.search(r"[\s,]", line) for line in lines):
            return refusal
        label_by_name = dict(zip(sorted(names), lines, strict=True))
    labels = {label for name, label in label_by_name.items() if name in names}
    if not labels:
        return refusal
    if labels <= set(_NUMBERS):
        classes = tuple(str(i) for i in range(max(map(int, labels)) + 1))
    else:
        classes = tuple(sorted(labels))
    images: list[Found] = []
    rejects = list(files.rejects)
    for name in names:
        location = f"{path.name}/{name}"
        if name in label_by_name and files.data_by_name[name]:
            data = label_data(files.data_by_name[name])
            images.append(Found(location, label_by_name[name], data))
        else:
            rejects.append(location)
    if len(classes) < 2 or not images:
        return refusal
    return Reading(images, classes, rejects, counts=count_other_files(others))


NESTED = Kind(nested_cases(), write_nested, read_nested)
LABELED = Kind(labeled_cases(), write_labeled, read_labeled)
