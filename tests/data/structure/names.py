"""Random names of the shards of a folder: which make one set."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st
from structure.common import (
    JUNK,
    Found,
    Kind,
    Reading,
    Refusal,
    is_junk_path,
    label_data,
    make_pool,
)
from structure.tars import Member, make_tar

# Words of a split, and the split that they tell.
_WORDS = {
    "train": "train",
    "Training": "train",
    "val": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
_PREFIXES = ("", "imagenet-", "a_", "wds.")
_SETS = ("train", "train", "Training", "val", "validation", "dev", "test", None)


class Names(NamedTuple):
    """Names of a folder."""

    shards: list[str]
    splits: set[str]
    """What the names of shards tell."""
    is_whole: bool
    """Whether numbered sets are complete, each of one version."""
    has_copy: bool
    others: list[str]
    """Folders, compressed archives and junk."""


@st.composite
def name_cases(draw: st.DrawFn) -> Names:
    """One set as a rule, sometimes two, sometimes with a fault."""
    shards: list[str] = []
    splits: set[str] = set()
    is_whole = True
    prefix = draw(st.sampled_from(_PREFIXES))
    num_sets = draw(st.sampled_from((1, 1, 1, 2)))
    words = draw(
        st.lists(st.sampled_from(_SETS), min_size=num_sets, max_size=num_sets, unique=True)
    )  # fmt: skip
    is_numbered = draw(st.booleans())
    for word in words:
        count = draw(st.integers(1, 4))
        stem = prefix + (word or "part")
        numbers = list(range(count))
        if is_numbered and count > 1 and not draw(st.integers(0, 5)):
            numbers.pop(draw(st.integers(0, count - 1)))
            is_whole = False
        of = f"-of-{count:05d}" if is_numbered else ""
        suffix = draw(st.sampled_from(("tar", "TAR")))
        shards += [f"{stem}-{number:05d}{of}.{suffix}" for number in numbers]
        if word is not None:
            splits.add(_WORDS[word])
        elif is_numbered:
            # What stands before -of- is a split, whatever it is called.
            splits.add(stem)
        if is_numbered and not draw(st.integers(0, 9)):
            shards.append(f"{stem}-00000-of-{count + 1:05d}.{suffix}")
            is_whole = False
    has_copy = not draw(st.integers(0, 7))
    if has_copy:
        stem, _, suffix = draw(st.sampled_from(shards)).rpartition(".")
        mark = draw(st.sampled_from(("{} (1)", "{}(2)", "{} - Copy", "Copy of {}")))
        shards.append(f"{mark.format(stem)}.{suffix}")
    extra = ("extra.tar.gz", "folder", "notes.txt", "0.tar.part", *JUNK[:6])
    others = draw(st.lists(st.sampled_from(extra), max_size=2, unique=True))
    return Names(draw(st.permutations(shards)), splits, is_whole, has_copy, others)


def write_names(case: Names, folder: Path) -> dict[str, Any]:
    """Write the same two samples as each shard."""
    members = [
        Member("0.jpg", 0), Member("0.cls", b"0"),
        Member("1.jpg", 1), Member("1.cls", b"1"),
    ]  # fmt: skip
    data = make_tar(members)
    for name in case.shards:
        (folder / name).write_bytes(data)
    for name in case.others:
        if name == "folder":
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(b"")
    return {"url": str(folder)}


def read_names(case: Names, options: dict[str, Any]) -> Reading | Refusal:
    """Take all shards, if they are one set."""
    if len(case.splits) > 1 or not case.is_whole or case.has_copy:
        stems = [re.split(r"[-.(]", name)[0] for name in case.shards]
        return Refusal(sorted({*case.shards, *stems} - {""}))
    images: list[Found] = []
    for name in case.shards:
        for i in range(2):
            data = label_data(make_pool()[i])
            images.append(Found(f"{name}/{i}.jpg", str(i), data))
    mentions = [
        name for name in case.others if not is_junk_path(name) and name != "notes.txt"
    ]
    return Reading(images, ("0", "1"), [], mentions)


SHARD_NAMES = Kind(name_cases(), write_names, read_names)
