"""WebDataset shards as a source of images: tar archives in which neighbours of one name are a sample."""

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


def open_webdataset(store: Store, files: Sequence[DirectoryEntry]) -> ImageSource:
    """WebDataset shards: members of one name and several endings, one after another, are a sample.

    Images end in .jpg, .jpeg, .png or .webp, labels in .cls (a number) or .json (a number under `label` or `cls`).

    Raises:
        OSError: they cannot be read.
        UserError: one is damaged, or no shard holds labelled images.
    """
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        found = [
            one
            for ones in pool.map(
                lambda file: list(_iter_samples(store, file.name)), files
            )
            for one in ones
        ]
    labels = [one.label for one in found if isinstance(one, Block)]
    if not labels:
        reasons = "; ".join(
            f"{one.name}: {one.reason}" for one in found[:1] if isinstance(one, Reject)
        )
        raise UserError(
            f"{store.redacted_url} holds no labelled images as WebDataset writes them, such as 0001.jpg beside 0001.cls"
            + (f" ({reasons})" if reasons else "")
        )
    return build_tar_source(
        store, "WebDataset", name_classes_by_number(max(labels) + 1, store), found
    )


def _iter_samples(store: Store, path: str) -> Iterator[Block | Reject]:
    key, parts, odd = "", dict[str, TarMember](), list[TarMember]()
    for member in iter_members(store, path):
        if isinstance(member, Reject):
            yield Reject(f"{path}/{member.name}", member.reason)
            continue
        ending = get_extension(member.name)
        if (here := member.name[: len(member.name) - len(ending)]) != key:
            yield from _assemble_sample(path, key, parts, odd)
            key, parts, odd = here, {}, []
        if ending in parts:
            yield Reject(
                f"{path}/{member.name}", "a second file of one sample and kind"
            )
        elif ending in _IMAGE_EXTENSIONS | LABEL_EXTENSIONS:
            parts[ending] = member
        elif ending.rpartition(".")[2] in _IMAGE_EXTENSIONS:
            odd.append(member)
    yield from _assemble_sample(path, key, parts, odd)


def _assemble_sample(
    path: str,
    key: str,
    members_by_extension: dict[str, TarMember],
    multi_dot_images: Sequence[TarMember],
) -> Iterator[Block | Reject]:
    """At most one block, of the parts of a sample by their endings."""
    images = [
        members_by_extension[kind]
        for kind in members_by_extension
        if kind in _IMAGE_EXTENSIONS
    ]
    if not images:  # such as photo.v2.jpg: WebDataset's key ends at the first dot
        yield from (
            Reject(f"{path}/{member.name}", "more than one dot in its name")
            for member in multi_dot_images
        )
    name = f"{path}/{images[0].name if images else key}"
    if not members_by_extension:
        return
    if len(images) != 1:
        yield Reject(name, f"{len(images)} images in one sample")
        return
    label = _parse_label(members_by_extension)
    yield (
        label._replace(name=name)
        if isinstance(label, Reject)
        else to_block(path, images[0], label)
    )


def _parse_label(members_by_extension: dict[str, TarMember]) -> int | Reject:
    for kind in ("cls", "json"):
        if kind not in members_by_extension:
            continue
        try:
            if kind == "cls":
                return _check_label_range(int(members_by_extension[kind].label_data))
            tree = json.loads(members_by_extension[kind].label_data)
            label = next(tree[name] for name in _JSON_LABEL_KEYS if name in tree)
            if int(label) != float(label):
                raise ValueError(label)
            return _check_label_range(int(label))
        except (
            ValueError,
            TypeError,
            OverflowError,
            RecursionError,
            StopIteration,
            AttributeError,
        ):
            return Reject("", f"its .{kind} holds no label")
    return Reject("", "no label")


def _check_label_range(label: int) -> int:
    if not 0 <= label < 1 << 31:
        raise ValueError(label)
    return label
