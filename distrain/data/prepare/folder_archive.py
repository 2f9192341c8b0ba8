"""Tar archives of one folder of images per class, as a source."""

from collections.abc import Mapping, Sequence

from distrain.data.prepare.class_folders import (
    check_inner_splits,
    has_image_name,
    note_other_files,
    note_similar_classes,
)
from distrain.data.prepare.image_folder import has_image_extension
from distrain.data.prepare.source import Block, ImageSource, Reject
from distrain.data.prepare.splits import find_split_folders
from distrain.data.prepare.tar_listing import find_common_folder, normalize_name
from distrain.data.prepare.tar_members import (
    TarMember,
    build_tar_source,
    to_block,
)
from distrain.data.storage.store import Store
from distrain.errors import UserError


def has_class_folders(files_by_path: Mapping[str, Sequence[TarMember]]) -> bool:
    """Return whether any image lies in a folder that not all of them share."""
    names = _list_image_names(files_by_path)
    common = find_common_folder(names)
    return any("/" in name.removeprefix(common) for name in names)


def open_folder_archives(
    store: Store,
    files_by_path: Mapping[str, Sequence[TarMember]],
    rejects: Sequence[Reject],
) -> ImageSource:
    """Open archives of class folders by the rules of an image folder.

    A class is a folder at the first level below the folders that all images share; its
    images lie at any depth.

    Args:
        store: where the archives are.
        files_by_path: files of each archive; some image lies in a class folder.
        rejects: members that are no files.

    Raises:
        UserError: some images lie outside the class folders, or the folders are splits.
    """
    # The first level below the common folders: folders with images are classes.
    image_names = _list_image_names(files_by_path)
    common = find_common_folder(image_names)
    for path, files in files_by_path.items():
        for file in files:
            is_inside = "/" in _get_name(file).removeprefix(common)
            if has_image_extension(file.name) and not is_inside:
                raise UserError(
                    f"{store.redacted_url}/{path} holds an image outside the class "
                    f"folders, {file.name}, and no labels: move it into one, or pass a "
                    "list of labels, --labels FILE (labels=FILE)"
                )
    classes = sorted({_get_class(name, common) for name in image_names})
    inner_names = [name.removeprefix(common) for name in image_names]
    location = f"{store.redacted_url}/{next(iter(files_by_path))}"
    splits = find_split_folders(classes, inner_names)
    if splits:
        raise UserError(
            f"{location} holds several splits ({', '.join(splits)}): unpack it, and "
            "pass the folder of one"
        )
    check_inner_splits(location, inner_names)

    # A file in a class folder may be an image unless its name says that it is none.
    # Files beside the class folders are notes, lists or licenses.
    label_by_class = {name: label for label, name in enumerate(classes)}
    blocks: list[Block | Reject] = []
    other_names: list[str] = []
    empty_folders: set[str] = set()
    for path, files in files_by_path.items():
        for file in files:
            name = _get_name(file)
            if not name.startswith(common) or "/" not in name.removeprefix(common):
                continue
            class_name = _get_class(name, common)
            if class_name not in label_by_class:
                empty_folders.add(class_name)
            elif has_image_name(name):
                blocks.append(to_block(path, file, label_by_class[class_name]))
            else:
                other_names.append(f"{path}/{file.name}")
    notes = [*note_similar_classes(classes), *note_other_files(other_names)]
    if empty_folders:
        notes.append(
            "these folders hold no image, and are no classes: "
            f"{', '.join(sorted(empty_folders))}"
        )

    # The order of members is that of a disk: sort them.
    blocks.sort(key=lambda item: (_get_label(item), item.name))
    return build_tar_source(
        store, "archive of class folders", classes, blocks, rejects, notes
    )


def _list_image_names(files_by_path: Mapping[str, Sequence[TarMember]]) -> list[str]:
    return [
        _get_name(file)
        for files in files_by_path.values()
        for file in files
        if has_image_extension(file.name)
    ]


def _get_name(file: TarMember) -> str:
    return normalize_name(file.name)


def _get_class(name: str, common: str) -> str:
    return name.removeprefix(common).partition("/")[0]


def _get_label(item: Block | Reject) -> int:
    return item.label if isinstance(item, Block) else -1
