"""WebDataset shards as a source: members of a tar that share a key form a sample."""

import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from distrain.data.prepare.class_numbers import LabelValue, number_classes
from distrain.data.prepare.folder_archive import (
    has_class_folders,
    open_folder_archives,
)
from distrain.data.prepare.image_folder import USUAL_EXTENSIONS, has_image_extension
from distrain.data.prepare.label_match import check_is_labeling
from distrain.data.prepare.source import Block, ImageSource, Reject
from distrain.data.prepare.splits import find_split_folders
from distrain.data.prepare.tar_listing import (
    find_common_folder,
    list_members,
    normalize_name,
)
from distrain.data.prepare.tar_members import (
    LABEL_EXTENSIONS,
    TarMember,
    build_tar_source,
    get_extension,
    to_block,
)
from distrain.data.storage.backend import DirectoryEntry
from distrain.data.storage.store import Store
from distrain.errors import UserError

_JSON_LABEL_KEYS = ("label", "cls", "class", "target", "category")
_NUM_THREADS = 16
# Members that webdataset's own reader passes over, such as __meta__.json/x.
_METADATA = re.compile(r"__[^/]*__($|/)")
# A longer text is a caption.
_MAX_NAME_CHARS = 200
# Exceptions of a label file that is text of some other kind, or hostile JSON.
_LABEL_ERRORS = (
    ValueError,
    TypeError,
    OverflowError,
    RecursionError,
    StopIteration,
    AttributeError,
)


class _LabeledImage(NamedTuple):
    block: Block
    """Image, without its label."""
    value: LabelValue


@dataclass
class _Group:
    """Members of one key."""

    images: list[TarMember] = field(default_factory=list)
    """Images of a usual extension without a dot."""
    other_images: list[TarMember] = field(default_factory=list)
    """Images such as 0001.avif, or 0001.left.jpg, whose key is 0001: those of a sample
    that has no usual one."""
    label_by_extension: dict[str, TarMember] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)


class _Shard(NamedTuple):
    samples: list[_LabeledImage | Reject]
    has_labels: bool
    """Whether any image has a label beside it."""
    unlabeled_files: list[TarMember]
    """All files, if none has."""
    rejects: list[Reject]
    """Members that are no files."""


def open_webdataset(store: Store, files: Sequence[DirectoryEntry]) -> ImageSource:
    """Open WebDataset shards: members of one key and several extensions, in any order.

    A key is the name of a member up to the first dot after its folder. Labels are
    .cls, .label or .class files (a number or a name), or .json files (the same under
    `label`, `cls`, `class`, `target` or `category`). Archives without labels are opened
    as class folders, if they hold folders.

    Raises:
        OSError: the shards cannot be read.
        UserError: one is damaged, none holds labeled images, or some labels are
            numbers and others names.
    """
    # Walk the archives in threads, but keep their order.
    paths = [file.name for file in files]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        shards = list(pool.map(lambda path: _read_shard(store, path), paths))
    rejects = [reject for shard in shards for reject in shard.rejects]
    samples = [sample for shard in shards for sample in shard.samples]
    location = store.redacted_url
    if len(files) == 1:
        location = f"{location}/{paths[0]}"

    # Without a label beside an image in any archive, folders may be the classes.
    if not any(shard.has_labels for shard in shards):
        files_by_path = {
            path: shard.unlabeled_files
            for path, shard in zip(paths, shards, strict=True)
        }
        if has_class_folders(files_by_path):
            return open_folder_archives(store, files_by_path, rejects)

    # Number the classes: all labels are numbers, or all are names.
    labeled = [sample for sample in samples if isinstance(sample, _LabeledImage)]
    if not labeled:
        raise _describe_no_labels([*rejects, *_only_rejects(samples)], location)
    _check_one_split([image.block for image in labeled], location)
    _check_one_type(labeled, location)
    values = [image.value for image in labeled]
    check_is_labeling([value for value in values if isinstance(value, str)], location)
    numbers = number_classes(values, location)

    blocks: list[Block | Reject] = []
    for sample in samples:
        if isinstance(sample, Reject):
            blocks.append(sample)
        elif sample.value not in numbers.number_by_value:
            reason = f"label {sample.value}: no label"
            blocks.append(Reject(sample.block.name, reason))
        else:
            label = numbers.number_by_value[sample.value]
            blocks.append(sample.block._replace(label=label))
    return build_tar_source(
        store, "WebDataset", numbers.classes, blocks, rejects, numbers.notes
    )


def _only_rejects(samples: Sequence[_LabeledImage | Reject]) -> list[Reject]:
    return [sample for sample in samples if isinstance(sample, Reject)]


def _describe_no_labels(rejects: Sequence[Reject], location: str) -> UserError:
    example = f" ({rejects[0].name}: {rejects[0].reason})" if rejects else ""
    return UserError(
        f"{location} holds no labeled images in the WebDataset layout, such as "
        f"0001.jpg beside 0001.cls{example}: add the labels, put the images into one "
        "folder per class, or pass a list of labels for a single archive, "
        "--labels FILE (labels=FILE)"
    )


def _check_one_split(blocks: Sequence[Block], location: str) -> None:
    """Raise UserError if the images lie in folders of several splits."""
    names = [
        normalize_name(block.name.removeprefix(block.path)[1:]) for block in blocks
    ]
    common = find_common_folder(names)
    inner_names = [name.removeprefix(common) for name in names]
    folders = sorted({name.split("/")[0] for name in inner_names if "/" in name})
    splits = find_split_folders(folders, inner_names)
    if splits:
        raise UserError(
            f"{location} holds several splits ({', '.join(splits)}): write each one to "
            "archives of its own"
        )


def _check_one_type(labeled: Sequence[_LabeledImage], location: str) -> None:
    """Raise UserError if some labels are numbers and others names."""
    example_by_type: dict[bool, _LabeledImage] = {}
    for image in labeled:
        is_name = isinstance(image.value, (str, bool))
        example_by_type.setdefault(is_name, image)
    if len(example_by_type) > 1:
        number = example_by_type[False]
        name = example_by_type[True]
        raise UserError(
            f"{location} has labels of several types, such as {number.value} of "
            f"{number.block.name} and {name.value!r} of {name.block.name}: labels are "
            "numbers from 0, one per class, or names"
        )


def _read_shard(store: Store, path: str) -> _Shard:
    """Group the members of one archive into samples, in the order of their first ones.

    Raises OSError and UserError.
    """
    files, rejects = list_members(store, path)
    members_by_key: dict[str, list[TarMember]] = {}
    for member in files:
        extension = get_extension(member.name)
        if extension and not _METADATA.match(member.name):
            key = member.name[: len(member.name) - len(extension)]
            members_by_key.setdefault(key.removeprefix("./"), []).append(member)

    samples: list[_LabeledImage | Reject] = []
    has_labels = False
    for key, members in members_by_key.items():
        group = _classify_members(members, path)
        if group.label_by_extension and (group.images or group.other_images):
            has_labels = True
        samples.extend(_assemble_sample(path, key, group))
    # Contents of labels are not needed again.
    unlabeled_files = []
    if not has_labels:
        unlabeled_files = [member._replace(label_data=b"") for member in files]
    return _Shard(samples, has_labels, unlabeled_files, rejects)


def _classify_members(members: Sequence[TarMember], path: str) -> _Group:
    """Tell the members of a key apart; extensions of other kinds are ignored."""
    group = _Group()
    extensions: set[str] = set()
    for member in members:
        extension = get_extension(member.name)
        is_label = extension in LABEL_EXTENSIONS
        if not is_label and extension not in USUAL_EXTENSIONS:
            if has_image_extension(member.name):
                group.other_images.append(member)
        elif extension in extensions:
            reason = "a second file of one sample with the same extension"
            group.rejects.append(Reject(f"{path}/{member.name}", reason))
        elif is_label:
            group.label_by_extension[extension] = member
        else:
            group.images.append(member)
        extensions.add(extension)
    return group


def _assemble_sample(
    path: str, key: str, group: _Group
) -> Iterator[_LabeledImage | Reject]:
    """Yield at most one image from the members of a key, and its rejects."""
    yield from group.rejects
    # WebDataset's key ends at the first dot, so photo.v2.jpg may belong to others.
    images = group.images
    if not images and group.label_by_extension:
        images = group.other_images
    elif not images:
        for member in group.other_images:
            has_dot = "." in get_extension(member.name)
            reason = "more than one dot in its name" if has_dot else "no label"
            yield Reject(f"{path}/{member.name}", reason)
        return

    # A sample has one image and one label. JSON may also describe the whole archive.
    value = _parse_label(group.label_by_extension)
    is_json_alone = not images and set(group.label_by_extension) == {"json"}
    if is_json_alone and isinstance(value, Reject):
        return
    if len(images) != 1:
        reason = f"{len(images)} images in one sample"
        names = [image.name for image in images] or [key]
        yield from (Reject(f"{path}/{name}", reason) for name in names)
        return
    name = f"{path}/{images[0].name}"
    if isinstance(value, Reject):
        yield value._replace(name=name)
        return
    block = to_block(path, images[0], 0)
    yield block if isinstance(block, Reject) else _LabeledImage(block, value)


def _parse_label(label_by_extension: dict[str, TarMember]) -> LabelValue | Reject:
    """Parse the label of a sample, from its .cls file if there is one."""
    for extension in LABEL_EXTENSIONS:
        if extension not in label_by_extension:
            continue
        data = label_by_extension[extension].label_data
        try:
            # Files from Windows may start with a byte order mark.
            text = data.decode("utf-8-sig")
            return _parse_json(text) if extension == "json" else _parse_text(text)
        except _LABEL_ERRORS:
            return Reject("", f"its .{extension} holds no label")
    return Reject("", "no label")


def _parse_text(text: str) -> int | str:
    """Parse a number or a name. Raises ValueError if it is neither."""
    text = text.strip()
    try:
        number = float(text)
    except ValueError:
        if not text or not text.isprintable() or len(text) > _MAX_NAME_CHARS:
            raise
        return text
    return _parse_number(number)


def _parse_json(text: str) -> LabelValue:
    tree = json.loads(text)
    value = next(tree[key] for key in _JSON_LABEL_KEYS if tree.get(key) is not None)
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _parse_text(value)
    return _parse_number(float(value))


def _parse_number(number: float) -> int:
    # int() would round 3.7 to a label.
    label = int(number)
    if label != number or abs(label) >= 1 << 31:
        raise ValueError(number)
    return label
