"""Tar archives as a source of images: those of ILSVRC-2012, others with a list of labels, and WebDataset shards."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

from distrain.data.prepare.labels import devkit, lines
from distrain.data.prepare.source import Block, Opened, Refused, Source, Wanted, opens
from distrain.data.prepare.tar import Member, as_block, first_member, members, source_of
from distrain.data.prepare.webdataset import open_webdataset
from distrain.data.storage.backend import Entry
from distrain.data.storage.store import Store
from distrain.errors import UserError

_AT_ONCE = 16


@opens("tar")
def open_tars(store: Store, files: Sequence[Entry], wanted: Wanted) -> Opened:
    """Open tar archives; the first file in the first archive decides how. Raises UserError and OSError."""
    return Opened(_open(store, files, wanted.labels), None)


def _open(store: Store, files: Sequence[Entry], labels: str | None) -> Source:
    first = files[0].name
    if first_member(store, first).endswith(".tar"):
        if len(files) > 1:
            raise UserError(
                f"{store.name}: {first} is an archive of archives: name it alone"
            )
        return _open_tar_of_tars(store, first)
    if labels is None:
        return open_webdataset(store, files)
    if len(files) > 1:
        raise UserError(
            f"--labels goes with one archive, and {store.name} has {len(files)}: name it"
        )
    if labels.endswith((".tar.gz", ".tgz")):
        truth, synsets = devkit(labels)
        return _open_labelled(store, first, truth, sorted(synsets))
    return _open_labelled(store, first, lines(labels), None)


def _open_tar_of_tars(store: Store, path: str) -> Source:
    """`ILSVRC2012_img_train.tar`: an archive of one archive a class, named after its synset.

    Raises:
        OSError: it cannot be read.
        UserError: it is damaged.
    """
    outer, refused = list[Member](), list[Refused]()
    for member in members(store, path):
        if isinstance(member, Refused) or not member.name.endswith(".tar"):
            refused.append(
                Refused(
                    f"{path}/{member.name}",
                    getattr(member, "reason", "no archive of a class"),
                )
            )
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
                block = as_block(path, member, label)
                found.append(block._replace(name=f"{place}/{member.name}"))
        return found

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        blocks = [
            block for found in pool.map(inner, range(len(outer))) for block in found
        ]
    return source_of(store, "archive of archives", classes, blocks, refused)


def _open_labelled(
    store: Store, path: str, labels: Sequence[str], classes: Sequence[str] | None
) -> Source:
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
    files = sorted(
        (one for one in found if isinstance(one, Member)),
        key=lambda member: member.name,
    )
    refused = [
        Refused(f"{path}/{one.name}", one.reason)
        for one in found
        if isinstance(one, Refused)
    ]
    pairs = [line.replace(",", " ").split() for line in labels if line.strip()]
    if pairs and pairs[0][0].lower() in (
        "imageid",
        "filename",
        "file",
    ):  # a table's head
        pairs = pairs[1:]
    if all(len(pair) == 1 for pair in pairs):
        if len(pairs) != len(files):
            raise UserError(
                f"the list has {len(pairs)} labels for {len(files)} files in {store.name}/{path}"
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
        as_block(path, file, number[by_name[file.name]])
        if by_name.get(file.name) in number
        else Refused(f"{path}/{file.name}", "the list has no label for it")
        for file in files
    ]
    return source_of(store, "labelled archive", classes, blocks, refused)
