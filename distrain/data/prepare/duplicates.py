"""Find equal images within a data set and across two, by the hashes in their manifests.

Only of the images that are equal, labels and names are read.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrain.data.decoding.pixel_hash import HASH_NAME
from distrain.data.prepare.sample_names import NamedSample, name_samples
from distrain.data.shards.dataset import open_shard_store
from distrain.data.shards.manifest import Manifest
from distrain.data.storage.store import Store
from distrain.errors import UserError

MAX_EXAMPLES = 3


class HashedSet(NamedTuple):
    """A data set whose images are compared."""

    store: Store
    """Where the manifest is."""
    manifest: Manifest

    @property
    def url(self) -> str:
        """URL for messages."""
        return self.store.redacted_url


class Matches(NamedTuple):
    """Images for which a match was found."""

    num_images: int
    examples: list[str]
    """At most three, such as "cat/1.jpg = cat/9.jpg"."""


class DuplicateReport(NamedTuple):
    """Equal images of one data set, or of two. None: not looked for."""

    url: str
    other_url: str | None = None
    leaks: Matches | None = None
    """Images that are in the other data set too."""
    copies: Matches | None = None
    """Images that equal an earlier one of their data set."""
    other_copies: Matches | None = None
    """The same of the other data set."""
    conflicts: Matches | None = None
    """Images, of both data sets, that equal an earlier one under another class name."""
    near_leaks: Matches | None = None
    """Images that are not in the other data set, but look like one of it."""
    near_copies: Matches | None = None
    """Images that look like another one of their data set, and do not equal it."""
    notes: Sequence[str] = ()
    """What limits the report, a sentence each."""


class EqualImages(NamedTuple):
    """Images of equal hashes, group by group, ordered by id in a group."""

    ids: NDArray[np.int64]
    """Sample id, or its sum with the number of rows of the first set if the image is
    one of the second."""
    groups: NDArray[np.int64]
    """Index of the group of each image, ascending."""


def check_hashes(dataset: HashedSet) -> str | None:
    """Return a sentence if a data set has no hashes that can be compared."""
    pixel_hash = dataset.manifest.pixel_hash
    if pixel_hash is None:
        problem = "has no hashes of pixels"
    elif pixel_hash.definition != HASH_NAME:
        problem = f"has hashes of pixels of another kind ({pixel_hash.definition})"
    else:
        return None
    return (
        f"{dataset.url} {problem}, by which equal images are found: pack or index it "
        "again"
    )


def check_comparable(datasets: Iterable[HashedSet]) -> None:
    """Raise UserError if a data set has no hashes that can be compared."""
    for dataset in datasets:
        problem = check_hashes(dataset)
        if problem is not None:
            raise UserError(problem)


def find_equal_images(hashes: Sequence[NDArray[np.uint64]]) -> EqualImages:
    """Return the images whose hash another one has.

    Args:
        hashes: hash of each row of each data set, (rows, 2); zeros are no hash.
    """
    values = np.concatenate(hashes)
    ids = np.flatnonzero(values.any(axis=1))
    # The sort is stable, so that the ids of equal hashes stay in order.
    order = ids[np.lexsort((values[ids, 1], values[ids, 0]))]
    is_equal = (values[order[1:]] == values[order[:-1]]).all(axis=1)

    # An image is in a group if it equals the one before or after it.
    equals_previous = np.append(False, is_equal)[: len(order)]
    equals_next = np.append(is_equal, False)[: len(order)]
    is_member = equals_previous | equals_next
    groups = np.cumsum(~equals_previous[is_member]) - 1
    return EqualImages(order[is_member], groups)


def find_duplicates(
    dataset: HashedSet, other: HashedSet | None = None
) -> DuplicateReport:
    """Find equal images within data sets and across them.

    Args:
        dataset: a data set; if it has no hashes, the report has a note.
        other: another one to compare it with; both have hashes.
    """
    # Without hashes, nothing can be said.
    datasets = [dataset] if other is None else [dataset, other]
    report = DuplicateReport(dataset.url, None if other is None else other.url)
    problem = check_hashes(dataset)
    if problem is not None:
        return report._replace(notes=[problem])

    # Find equal images, then their names and classes.
    hashes = list[NDArray[np.uint64]]()
    for member in datasets:
        member_hashes = member.manifest.pixel_hashes
        assert member_hashes is not None, "hashes were checked"
        hashes.append(member_hashes)
    equal = find_equal_images(hashes)
    samples, notes = _name_members(equal, datasets)
    is_other = equal.ids >= dataset.manifest.num_rows

    # Count and describe them.
    report = report._replace(
        copies=_find_copies(equal, samples, ~is_other),
        conflicts=_find_conflicts(equal, samples),
        notes=[*_compare_decoders(datasets), *notes],
    )
    if other is None:
        return report
    return report._replace(
        leaks=_find_leaks(equal, samples, is_other),
        other_copies=_find_copies(equal, samples, is_other),
    )


def _name_members(
    equal: EqualImages, datasets: Sequence[HashedSet]
) -> tuple[list[NamedSample], list[str]]:
    """Return name and class of equal images, and what cannot be read of them.

    With two data sets, a name begins with that of its data set.
    """
    titles = make_titles([dataset.url for dataset in datasets])
    samples: list[NamedSample | None] = [None] * len(equal.ids)
    notes = list[str]()
    first_id = 0
    for title, (store, manifest) in zip(titles, datasets, strict=True):
        next_id = first_id + manifest.num_rows
        places = np.flatnonzero((equal.ids >= first_id) & (equal.ids < next_id))
        shard_store = open_shard_store(manifest, store)
        named, set_notes = name_samples(
            shard_store, manifest, equal.ids[places] - first_id
        )
        for place, sample in zip(places.tolist(), named, strict=True):
            samples[place] = sample._replace(name=title + sample.name)
        notes.extend(set_notes)
        first_id = next_id
    return [sample for sample in samples if sample is not None], notes


def make_titles(urls: Sequence[str]) -> list[str]:
    """Return what stands before the names of images: short names of the data sets."""
    if len(urls) == 1:
        return [""]
    titles = [url.rstrip("/").rpartition("/")[2] for url in urls]
    # Folders of one name are told apart by their whole URLs.
    return [f"{title} " for title in (titles if len({*titles}) > 1 else urls)]


def _compare_decoders(datasets: Sequence[HashedSet]) -> list[str]:
    """Return a sentence if the images of two data sets had different decoders."""
    pixel_hashes = [dataset.manifest.pixel_hash for dataset in datasets]
    decoders = [pixel_hash.decoder for pixel_hash in pixel_hashes if pixel_hash]
    if len(set(decoders)) == 1:
        return []
    sets = " and ".join(
        f"{dataset.url} ({decoder})"
        for dataset, decoder in zip(datasets, decoders, strict=True)
    )
    return [
        f"equal JPEG files may have other pixels and so not be found, since {sets} "
        "were decoded by different versions: pack or index both with one version"
    ]


def _find_copies(
    equal: EqualImages, samples: Sequence[NamedSample], is_member: NDArray[np.bool_]
) -> Matches:
    """Return the images that equal an earlier one, of the members of one data set."""
    rows = np.flatnonzero(is_member)
    groups = equal.groups[rows]
    equals_previous = np.append(False, groups[1:] == groups[:-1])[: len(rows)]
    copies = np.flatnonzero(equals_previous)
    # The first of a group is the original.
    firsts = rows[np.searchsorted(groups, groups[copies[:MAX_EXAMPLES]])]
    examples = [
        f"{samples[row].name} = {samples[first].name}"
        for row, first in zip(rows[copies], firsts, strict=False)
    ]
    return Matches(len(copies), examples)


def _find_leaks(
    equal: EqualImages, samples: Sequence[NamedSample], is_other: NDArray[np.bool_]
) -> Matches:
    """Return the images of the first data set that equal one of the second."""
    other_groups = equal.groups[is_other]
    leaked = np.flatnonzero(~is_other & np.isin(equal.groups, other_groups))
    other_rows = np.flatnonzero(is_other)
    examples = []
    for row in leaked[:MAX_EXAMPLES]:
        first = other_rows[np.searchsorted(other_groups, equal.groups[row])]
        examples.append(f"{samples[row].name} = {samples[first].name}")
    return Matches(len(leaked), examples)


def _find_conflicts(equal: EqualImages, samples: Sequence[NamedSample]) -> Matches:
    """Return the images that equal an earlier one under another class."""
    num_images = 0
    examples = list[str]()
    group_ends = np.cumsum(np.bincount(equal.groups))
    start = 0
    for end in group_ends.tolist():
        members = samples[start:end]
        known = [sample for sample in members if sample.class_name is not None]
        start = end
        others = [other for other in known if other.class_name != known[0].class_name]
        num_images += len(others)
        for other in others[: MAX_EXAMPLES - len(examples)]:
            examples.append(
                f"{other.name} ({other.class_name}) = {known[0].name} "
                f"({known[0].class_name})"
            )
    return Matches(num_images, examples)
