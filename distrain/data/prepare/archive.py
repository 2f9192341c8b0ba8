"""Tar archives as a source: ILSVRC-2012's, others with a list of labels, WebDataset."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import PurePosixPath

from distrain.data.prepare.class_folders import has_image_name, note_other_files
from distrain.data.prepare.image_folder import has_image_extension
from distrain.data.prepare.labeled_images import label_images
from distrain.data.prepare.source import (
    Block,
    ImageSource,
    OpenedSource,
    Reject,
    SourceOptions,
    register_opener,
)
from distrain.data.prepare.tar_listing import holds_archives, list_members
from distrain.data.prepare.tar_members import (
    TarMember,
    build_tar_source,
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
    """Open tar archives, in the layout that the first file of the first one shows.

    Raises UserError and OSError.
    """
    return OpenedSource(_open_by_layout(store, files, options.labels_url), None)


def _open_by_layout(
    store: Store, files: Sequence[DirectoryEntry], labels_url: str | None
) -> ImageSource:
    # An archive of archives has one inner archive per class.
    first = files[0].name
    if holds_archives(store, first):
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
    return _open_labeled_tar(store, first, labels_url)


def _open_tar_of_tars(store: Store, path: str) -> ImageSource:
    """Open an archive of one archive per class, such as `ILSVRC2012_img_train.tar`.

    Classes are the names of the inner archives: synsets, in ILSVRC-2012.

    Raises:
        OSError: the archive cannot be read.
        UserError: it is damaged.
    """
    # List the inner archives: labels follow the order of their names.
    members, rejects = list_members(store, path)
    class_archives = [member for member in members if member.name.endswith(".tar")]
    class_archives.sort(key=lambda member: member.name)
    for member in members:
        if not member.name.endswith(".tar"):
            rejects.append(Reject(f"{path}/{member.name}", "not a .tar of a class"))

    # Walk them in threads, but keep their order.
    list_archive = partial(_list_class_archive, store, path)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        listings = list(pool.map(list_archive, class_archives))

    # An archive without a file is no class.
    classes: list[str] = []
    empty: list[str] = []
    blocks: list[Block | Reject] = []
    for archive, items in zip(class_archives, listings, strict=True):
        if not items:
            empty.append(archive.name)
            continue
        for item in items:
            if isinstance(item, Block):
                blocks.append(item._replace(label=len(classes)))
            else:
                blocks.append(item)
        classes.append(PurePosixPath(archive.name).stem)
    _check_no_class_twice(classes, f"{store.redacted_url}/{path}")
    notes = []
    if empty:
        notes.append(
            f"these archives in {path} hold no file, and are no classes: "
            f"{', '.join(empty)}"
        )
    return build_tar_source(
        store, "archive of archives", classes, blocks, rejects, notes
    )


def _check_no_class_twice(classes: Sequence[str], location: str) -> None:
    (name, count), *_ = Counter(classes).most_common(1) or [("", 0)]
    if count > 1:
        raise UserError(
            f"{location} holds {count} archives named {name}.tar, in several folders: "
            "pack each folder by itself"
        )


def _list_class_archive(
    store: Store, path: str, archive: TarMember
) -> list[Block | Reject]:
    """List the images of an inner archive as byte ranges of the outer one.

    Labels are set later.
    """
    files, rejects = list_members(store, path, archive)
    blocks: list[Block | Reject] = [*rejects]
    for file in files:
        name = f"{path}/{archive.name}/{file.name}"
        blocks.append(to_block(path, file, 0)._replace(name=name))
    return blocks


def _open_labeled_tar(store: Store, path: str, labels_url: str) -> ImageSource:
    """Open an archive of images with a list of labels: `ILSVRC2012_img_val.tar`, say.

    Args:
        store: where the archive is.
        path: the archive.
        labels_url: the devkit of ILSVRC-2012, or a list: one label per image in the
            order of their names, or a table of images and labels.

    Raises:
        OSError: the archive cannot be read.
        UserError: the list does not fit the archive.
    """
    # List the images of the archive by name, the order that a list of labels follows.
    location = f"{store.redacted_url}/{path}"
    members, rejects = list_members(store, path)
    members.sort(key=lambda member: member.name)
    images = [member for member in members if has_image_extension(member.name)]
    # Without any extension of an image, each file may be one.
    images = images or members
    names = [image.name for image in images]
    other_names: list[str] = []
    for member in sorted(set(members) - set(images)):
        name = f"{path}/{member.name}"
        if has_image_name(name):
            rejects.append(Reject(name, "no image, by its extension"))
        else:
            other_names.append(name)

    labeled = label_images(names, labels_url, location)

    blocks: list[Block | Reject] = []
    for image in images:
        if image.name in labeled.label_by_name:
            blocks.append(to_block(path, image, labeled.label_by_name[image.name]))
        else:
            reason = labeled.reason_by_name[image.name]
            blocks.append(Reject(f"{path}/{image.name}", reason))
    return build_tar_source(
        store,
        "labeled archive",
        labeled.classes,
        blocks,
        rejects,
        [*labeled.notes, *note_other_files(other_names)],
    )
