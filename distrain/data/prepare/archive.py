"""Tar archives as a source: ILSVRC-2012's, others with a list of labels, WebDataset."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
# First cells of a header line in a list of labels, in lowercase.
_HEADER_CELLS = ("imageid", "filename", "file")


@register_opener("tar")
def open_tars(
    store: Store, files: Sequence[DirectoryEntry], options: SourceOptions
) -> OpenedSource:
    """Open tar archives, in the layout that the first file of the first one shows.

    Raises UserError and OSError.
    """
    return OpenedSource(_open_by_layout(store, files, options.labels_url), None)


def _open_by_layout(
    store: Store, files: Sequence[DirectoryEntry], labels_url: str | None
) -> ImageSource:
    # An archive of archives has one inner archive per class.
    first = files[0].name
    if find_first_member_name(store, first).endswith(".tar"):
        if len(files) > 1:
            raise UserError(
                f"{store.redacted_url}: {first} is an archive of archives, which "
                "cannot be combined with other files: pass its path alone"
            )
        if labels_url is not None:
            raise UserError(
                f"labels are for a .tar of images without labels, and {first} holds "
                "one archive per class: leave them out"
            )
        return _open_tar_of_tars(store, first)

    # Without a list of labels, the archives themselves must hold labels.
    if labels_url is None:
        return open_webdataset(store, files)

    if len(files) > 1:
        raise UserError(
            f"labels need a single archive, and {store.redacted_url} has "
            f"{len(files)}: pass the path of one"
        )
    if labels_url.endswith((".tar.gz", ".tgz")):
        truth, synsets = read_devkit(labels_url)
        return _open_labeled_tar(store, first, truth, sorted(synsets))
    return _open_labeled_tar(store, first, read_lines(labels_url), None)


def _open_tar_of_tars(store: Store, path: str) -> ImageSource:
    """Open an archive of one archive per class, such as `ILSVRC2012_img_train.tar`.

    Classes are the names of the inner archives: synsets, in ILSVRC-2012.

    Raises:
        OSError: the archive cannot be read.
        UserError: it is damaged.
    """
    # List the inner archives: labels follow the order of their names.
    class_archives: list[TarMember] = []
    rejects: list[Reject] = []
    for member in iter_members(store, path):
        if isinstance(member, Reject):
            rejects.append(Reject(f"{path}/{member.name}", member.reason))
        elif not member.name.endswith(".tar"):
            rejects.append(Reject(f"{path}/{member.name}", "not a .tar of a class"))
        else:
            class_archives.append(member)
    class_archives.sort(key=lambda member: member.name)
    classes = [PurePosixPath(member.name).stem for member in class_archives]

    # Walk them in threads, but keep their order.
    list_archive = partial(_list_class_archive, store, path)
    blocks: list[Block | Reject] = []
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        labels = range(len(class_archives))
        for class_blocks in pool.map(list_archive, class_archives, labels):
            blocks.extend(class_blocks)
    return build_tar_source(store, "archive of archives", classes, blocks, rejects)


def _list_class_archive(
    store: Store, path: str, archive: TarMember, label: int
) -> list[Block | Reject]:
    """List the images of an inner archive as byte ranges of the outer one."""
    blocks: list[Block | Reject] = []
    end = archive.start + archive.num_bytes
    for member in iter_members(store, path, archive.start, end):
        name = f"{path}/{archive.name}/{member.name}"
        if isinstance(member, Reject):
            blocks.append(Reject(name, member.reason))
        else:
            blocks.append(to_block(path, member, label)._replace(name=name))
    return blocks


def _open_labeled_tar(
    store: Store, path: str, label_lines: Sequence[str], classes: Sequence[str] | None
) -> ImageSource:
    """Open an archive of images with a list of labels: `ILSVRC2012_img_val.tar`, say.

    Args:
        store: where the archive is.
        path: the archive.
        label_lines: one synset per file in the order of file names, or lines of file
            name and synset.
        classes: all synsets; by default those of the list.

    Raises:
        OSError: the archive cannot be read.
        UserError: the list is of labels alone, and not one per file.
    """
    # List the files of the archive by name, the order that a list of labels follows.
    files: list[TarMember] = []
    rejects: list[Reject] = []
    for member in iter_members(store, path):
        if isinstance(member, Reject):
            rejects.append(Reject(f"{path}/{member.name}", member.reason))
        else:
            files.append(member)
    files.sort(key=lambda member: member.name)

    # Match the list with the files, then number the classes.
    class_by_file = _match_labels(files, label_lines, f"{store.redacted_url}/{path}")
    if classes is None:
        classes = sorted(set(class_by_file.values()))
    label_by_class = {name: label for label, name in enumerate(classes)}

    blocks: list[Block | Reject] = []
    for file in files:
        label = label_by_class.get(class_by_file.get(file.name, ""))
        if label is None:
            name = f"{path}/{file.name}"
            blocks.append(Reject(name, "the list has no label for it"))
        else:
            blocks.append(to_block(path, file, label))
    return build_tar_source(store, "labeled archive", classes, blocks, rejects)


def _match_labels(
    files: Sequence[TarMember], label_lines: Sequence[str], location: str
) -> dict[str, str]:
    """Return the class of each file for which the list has exactly one.

    Raises:
        UserError: the list has labels alone, and not one per file.
    """
    # Split the lines, which are separated by spaces or commas, and skip a header.
    rows = [line.replace(",", " ").split() for line in label_lines if line.strip()]
    if rows and rows[0][0].lower() in _HEADER_CELLS:
        rows = rows[1:]

    # Labels alone are in the order of files.
    if all(len(row) == 1 for row in rows):
        if len(rows) != len(files):
            raise UserError(
                f"the list has {len(rows)} labels for {len(files)} files in "
                f"{location}: it must have one per file"
            )
        return {file.name: row[0] for file, row in zip(files, rows, strict=True)}

    # Lines of file and label: match whole names first. A list may also leave out
    # folders and extensions, as long as the files of that stem have one label.
    class_by_name = {row[0]: row[1] for row in rows if len(row) > 1}
    classes_by_stem: dict[str, set[str]] = {}
    for name, class_name in class_by_name.items():
        classes_by_stem.setdefault(PurePosixPath(name).stem, set()).add(class_name)
    class_by_file: dict[str, str] = {}
    for file in files:
        stem_classes = classes_by_stem.get(PurePosixPath(file.name).stem, set())
        if file.name in class_by_name:
            class_by_file[file.name] = class_by_name[file.name]
        elif len(stem_classes) == 1:
            (class_by_file[file.name],) = stem_classes
    return class_by_file
