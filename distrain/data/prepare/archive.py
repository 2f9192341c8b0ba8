"""Tar archives as a source of images: those of ILSVRC-2012, others with a list of labels, and WebDataset shards."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

from distrain.data.prepare.labels import read_devkit, read_lines
from distrain.data.prepare.source import (
    Block,
    ImageSource,
    OpenedSource,
    Reject,
    SourceOptions,
    register_opener,
)
from distrain.data.prepare.tar_members import (
    TarMember,
    build_tar_source,
    find_first_member_name,
    iter_members,
    to_block,
)
from distrain.data.prepare.webdataset import open_webdataset
from distrain.data.storage.backend import DirectoryEntry
from distrain.data.storage.store import Store
from distrain.errors import UserError

_NUM_THREADS = 16


@register_opener("tar")
def open_tars(
    store: Store, files: Sequence[DirectoryEntry], options: SourceOptions
) -> OpenedSource:
    """Open tar archives; the first file in the first archive decides how. Raises UserError and OSError."""
    return OpenedSource(_open_by_layout(store, files, options.labels_url), None)


def _open_by_layout(
    store: Store, files: Sequence[DirectoryEntry], labels_url: str | None
) -> ImageSource:
    first = files[0].name
    if find_first_member_name(store, first).endswith(".tar"):
        if len(files) > 1:
            raise UserError(
                f"{store.redacted_url}: {first} is an archive of archives: name it alone"
            )
        return _open_tar_of_tars(store, first)
    if labels_url is None:
        return open_webdataset(store, files)
    if len(files) > 1:
        raise UserError(
            f"--labels goes with one archive, and {store.redacted_url} has {len(files)}: name it"
        )
    if labels_url.endswith((".tar.gz", ".tgz")):
        truth, synsets = read_devkit(labels_url)
        return _open_labeled_tar(store, first, truth, sorted(synsets))
    return _open_labeled_tar(store, first, read_lines(labels_url), None)


def _open_tar_of_tars(store: Store, path: str) -> ImageSource:
    """`ILSVRC2012_img_train.tar`: an archive of one archive a class, named after its synset.

    Raises:
        OSError: it cannot be read.
        UserError: it is damaged.
    """
    outer, refused = list[TarMember](), list[Reject]()
    for member in iter_members(store, path):
        if isinstance(member, Reject) or not member.name.endswith(".tar"):
            refused.append(
                Reject(
                    f"{path}/{member.name}",
                    getattr(member, "reason", "no archive of a class"),
                )
            )
        else:
            outer.append(member)
    outer.sort(key=lambda member: member.name)
    classes = [PurePosixPath(member.name).stem for member in outer]

    def list_class_archive(label: int) -> list[Block | Reject]:
        at = outer[label]
        place, found = f"{path}/{at.name}", list[Block | Reject]()
        for member in iter_members(store, path, at.start, at.start + at.num_bytes):
            if isinstance(member, Reject):
                found.append(Reject(f"{place}/{member.name}", member.reason))
            else:
                block = to_block(path, member, label)
                found.append(block._replace(name=f"{place}/{member.name}"))
        return found

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        blocks = [
            block
            for found in pool.map(list_class_archive, range(len(outer)))
            for block in found
        ]
    return build_tar_source(store, "archive of archives", classes, blocks, refused)


def _open_labeled_tar(
    store: Store, path: str, label_lines: Sequence[str], classes: Sequence[str] | None
) -> ImageSource:
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
    found = list(iter_members(store, path))
    files = sorted(
        (one for one in found if isinstance(one, TarMember)),
        key=lambda member: member.name,
    )
    refused = [
        Reject(f"{path}/{one.name}", one.reason)
        for one in found
        if isinstance(one, Reject)
    ]
    pairs = [line.replace(",", " ").split() for line in label_lines if line.strip()]
    if pairs and pairs[0][0].lower() in (
        "imageid",
        "filename",
        "file",
    ):  # a table's head
        pairs = pairs[1:]
    if all(len(pair) == 1 for pair in pairs):
        if len(pairs) != len(files):
            raise UserError(
                f"the list has {len(pairs)} labels for {len(files)} files in {store.redacted_url}/{path}"
            )
        by_name = {file.name: pair[0] for file, pair in zip(files, pairs, strict=True)}
    else:
        known = {pair[0]: pair[1] for pair in pairs if len(pair) > 1}
        stems: dict[str, set[str]] = {}
        for name, label in known.items():
            stems.setdefault(PurePosixPath(name).stem, set()).add(label)
        by_name = {}
        for file in files:
            label_of = (
                {known[file.name]}
                if file.name in known
                else stems.get(PurePosixPath(file.name).stem, set())
            )
            if len(label_of) == 1:
                by_name[file.name] = next(iter(label_of))
    classes = sorted(set(by_name.values())) if classes is None else classes
    number = {name: i for i, name in enumerate(classes)}
    blocks = [
        to_block(path, file, number[by_name[file.name]])
        if by_name.get(file.name) in number
        else Reject(f"{path}/{file.name}", "the list has no label for it")
        for file in files
    ]
    return build_tar_source(store, "labelled archive", classes, blocks, refused)
