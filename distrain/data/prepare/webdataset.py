"""WebDataset shards as a source: tar archives whose adjacent members form a sample."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from distrain.data.prepare.source import (
    Block,
    ImageSource,
    Reject,
    name_classes_by_number,
)
from distrain.data.prepare.tar_members import (
    LABEL_EXTENSIONS,
    TarMember,
    build_tar_source,
    get_extension,
    iter_members,
    to_block,
)
from distrain.data.storage.backend import DirectoryEntry
from distrain.data.storage.store import Store
from distrain.errors import UserError

_IMAGE_EXTENSIONS = {"jpg", "jpeg", "png", "webp"}
_JSON_LABEL_KEYS = ("label", "cls")
_NUM_THREADS = 16
# Exceptions of a label file that is text of some other kind, or hostile JSON.
_LABEL_ERRORS = (
    ValueError,
    TypeError,
    OverflowError,
    RecursionError,
    StopIteration,
    AttributeError,
)


def open_webdataset(store: Store, files: Sequence[DirectoryEntry]) -> ImageSource:
    """Open WebDataset shards: adjacent members with one key and several extensions.

    Images are .jpg, .jpeg, .png or .webp files; labels are .cls files (a number) or
    .json files (a number under `label` or `cls`).

    Raises:
        OSError: the shards cannot be read.
        UserError: one is damaged, or none holds labeled images.
    """
    # Walk the archives in threads, but keep their order.
    samples: list[Block | Reject] = []
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for shard_samples in pool.map(
            lambda file: list(_iter_samples(store, file.name)), files
        ):
            samples.extend(shard_samples)

    labels = [sample.label for sample in samples if isinstance(sample, Block)]
    if not labels:
        # Without a block, all samples are rejects: show the first one.
        example = ""
        if samples and isinstance(samples[0], Reject):
            example = f" ({samples[0].name}: {samples[0].reason})"
        location = store.redacted_url
        if len(files) == 1:
            location = f"{location}/{files[0].name}"
        raise UserError(
            f"{location} holds no labeled images in the WebDataset layout, such as "
            f"0001.jpg beside 0001.cls{example}: add the labels, or pass a list of "
            "them for a single archive, --labels FILE (labels=FILE)"
        )
    classes = name_classes_by_number(max(labels) + 1, store)
    return build_tar_source(store, "WebDataset", classes, samples)


def _iter_samples(store: Store, path: str) -> Iterator[Block | Reject]:
    """Yield the samples of one shard: members that follow each other with one key."""
    key = ""
    members_by_extension: dict[str, TarMember] = {}
    multi_dot_images: list[TarMember] = []
    for member in iter_members(store, path):
        if isinstance(member, Reject):
            yield Reject(f"{path}/{member.name}", member.reason)
            continue

        # Another key starts another sample.
        extension = get_extension(member.name)
        member_key = member.name[: len(member.name) - len(extension)]
        if member_key != key:
            yield from _assemble_sample(
                path, key, members_by_extension, multi_dot_images
            )
            key = member_key
            members_by_extension = {}
            multi_dot_images = []

        # Collect the members of this sample; other extensions are ignored.
        if extension in members_by_extension:
            reason = "a second file of one sample with the same extension"
            yield Reject(f"{path}/{member.name}", reason)
        elif extension in _IMAGE_EXTENSIONS | LABEL_EXTENSIONS:
            members_by_extension[extension] = member
        elif extension.rpartition(".")[2] in _IMAGE_EXTENSIONS:
            multi_dot_images.append(member)
    yield from _assemble_sample(path, key, members_by_extension, multi_dot_images)


def _assemble_sample(
    path: str,
    key: str,
    members_by_extension: dict[str, TarMember],
    multi_dot_images: Sequence[TarMember],
) -> Iterator[Block | Reject]:
    """Yield at most one block from the members of a sample, and its rejects."""
    images = [
        member
        for extension, member in members_by_extension.items()
        if extension in _IMAGE_EXTENSIONS
    ]
    # WebDataset's key ends at the first dot, so photo.v2.jpg has no usable extension.
    if not images:
        for member in multi_dot_images:
            yield Reject(f"{path}/{member.name}", "more than one dot in its name")
    if not members_by_extension:
        return

    # A sample has one image and one label.
    name = f"{path}/{images[0].name if images else key}"
    if len(images) != 1:
        yield Reject(name, f"{len(images)} images in one sample")
        return
    label = _parse_label(members_by_extension)
    if isinstance(label, Reject):
        yield label._replace(name=name)
    else:
        yield to_block(path, images[0], label)


def _parse_label(members_by_extension: dict[str, TarMember]) -> int | Reject:
    """Parse the label of a sample, from its .cls file if there is one."""
    for extension in ("cls", "json"):
        if extension not in members_by_extension:
            continue
        data = members_by_extension[extension].label_data
        try:
            return _parse_cls(data) if extension == "cls" else _parse_json(data)
        except _LABEL_ERRORS:
            return Reject("", f"its .{extension} holds no label")
    return Reject("", "no label")


def _parse_cls(data: bytes) -> int:
    return _check_label_range(int(data))


def _parse_json(data: bytes) -> int:
    tree = json.loads(data)
    label = next(tree[key] for key in _JSON_LABEL_KEYS if key in tree)
    # int() would round 3.7 to a label.
    if int(label) != float(label):
        raise ValueError(label)
    return _check_label_range(int(label))


def _check_label_range(label: int) -> int:
    if not 0 <= label < 1 << 31:
        raise ValueError(label)
    return label
