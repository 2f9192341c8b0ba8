"""WebDataset shards as a source of images: tar archives in which neighbours of one name are a sample."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from distrain.data.prepare.source import Block, Refused, Source, numbered
from distrain.data.prepare.tar import (
    LABELS,
    Member,
    as_block,
    ending_of,
    members,
    source_of,
)
from distrain.data.storage.backend import Entry
from distrain.data.storage.store import Store
from distrain.errors import UserError

_IMAGES = {"jpg", "jpeg", "png", "webp"}
_JSON_KEYS = ("label", "cls")
_AT_ONCE = 16


def open_webdataset(store: Store, files: Sequence[Entry]) -> Source:
    """WebDataset shards: members of one name and several endings, one after another, are a sample.

    Images end in .jpg, .jpeg, .png or .webp, labels in .cls (a number) or .json (a number under `label` or `cls`).

    Raises:
        OSError: they cannot be read.
        UserError: one is damaged, or no shard holds labelled images.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = [
            one
            for ones in pool.map(lambda file: list(_samples(store, file.name)), files)
            for one in ones
        ]
    labels = [one.label for one in found if isinstance(one, Block)]
    if not labels:
        reasons = "; ".join(
            f"{one.name}: {one.reason}" for one in found[:1] if isinstance(one, Refused)
        )
        raise UserError(
            f"{store.name} holds no labelled images as WebDataset writes them, such as 0001.jpg beside 0001.cls"
            + (f" ({reasons})" if reasons else "")
        )
    return source_of(store, "WebDataset", numbered(max(labels) + 1, store), found)


def _samples(store: Store, path: str) -> Iterator[Block | Refused]:
    key, parts, odd = "", dict[str, Member](), list[Member]()
    for member in members(store, path):
        if isinstance(member, Refused):
            yield Refused(f"{path}/{member.name}", member.reason)
            continue
        ending = ending_of(member.name)
        if (here := member.name[: len(member.name) - len(ending)]) != key:
            yield from _sample(path, key, parts, odd)
            key, parts, odd = here, {}, []
        if ending in parts:
            yield Refused(
                f"{path}/{member.name}", "a second file of one sample and kind"
            )
        elif ending in _IMAGES | LABELS:
            parts[ending] = member
        elif ending.rpartition(".")[2] in _IMAGES:
            odd.append(member)
    yield from _sample(path, key, parts, odd)


def _sample(
    path: str, key: str, parts: dict[str, Member], odd: Sequence[Member]
) -> Iterator[Block | Refused]:
    """At most one block, of the parts of a sample by their endings."""
    images = [parts[kind] for kind in parts if kind in _IMAGES]
    if not images:  # such as photo.v2.jpg: WebDataset's key ends at the first dot
        yield from (
            Refused(f"{path}/{member.name}", "more than one dot in its name")
            for member in odd
        )
    name = f"{path}/{images[0].name if images else key}"
    if not parts:
        return
    if len(images) != 1:
        yield Refused(name, f"{len(images)} images in one sample")
        return
    label = _label(parts)
    yield (
        label._replace(name=name)
        if isinstance(label, Refused)
        else as_block(path, images[0], label)
    )


def _label(parts: dict[str, Member]) -> int | Refused:
    for kind in ("cls", "json"):
        if kind not in parts:
            continue
        try:
            if kind == "cls":
                return _natural(int(parts[kind].text))
            tree = json.loads(parts[kind].text)
            label = next(tree[name] for name in _JSON_KEYS if name in tree)
            if int(label) != float(label):
                raise ValueError(label)
            return _natural(int(label))
        except (
            ValueError,
            TypeError,
            OverflowError,
            RecursionError,
            StopIteration,
            AttributeError,
        ):
            return Refused("", f"its .{kind} holds no label")
    return Refused("", "no label")


def _natural(number: int) -> int:
    if not 0 <= number < 1 << 31:
        raise ValueError(number)
    return number
