"""Find images that look alike, by a perceptual hash: every image is read and decoded.

Two images look alike if at most 3 of the 64 bits of their hashes differ. The hash is
`phash` of the library ImageHash, of the stored images. Plain images, such as those of
one color, all have nearly the same hash and are left out.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrain.data.decoding.bad_image import BadImageError
from distrain.data.decoding.image import open_rgb
from distrain.data.prepare.decode_memory import count_decoding_threads
from distrain.data.prepare.duplicates import (
    MAX_EXAMPLES,
    DuplicateReport,
    HashedSet,
    Matches,
    check_hashes,
    find_equal_images,
    make_titles,
)
from distrain.data.prepare.sample_names import name_samples
from distrain.data.prepare.source import RETRY_SECONDS
from distrain.data.shards.dataset import Dataset, Row, open_shard_store
from distrain.errors import UserError

_MAX_DISTANCE = 3
# Of four bands, one has no different bit if at most three bits differ.
_NUM_BANDS = 4
_BAND_BITS = 16
# Above the default limit of pack and index: what they accepted must decode here.
_MAX_PIXELS = 1 << 28
_MEMORY_BYTES = 64 << 20


class _HashedImages(NamedTuple):
    """Images of a data set with their perceptual hashes."""

    ids: NDArray[np.int64]
    """Sample ids, ascending."""
    hashes: NDArray[np.uint64]
    notes: list[str]
    """A sentence on the images that are left out, if there are any."""


def load_perceptual_hash() -> Callable[[Any], Any]:
    """Return the function that hashes an image. Raises UserError."""
    try:
        from imagehash import phash
    except ImportError:
        raise UserError(
            "looking for near-duplicates needs ImageHash: pip install 'distrain[near]'"
        ) from None
    hash_image: Callable[[Any], Any] = phash
    return hash_image


def add_near_duplicates(
    report: DuplicateReport, dataset: HashedSet, other: HashedSet | None = None
) -> DuplicateReport:
    """Return a report of equal images with those that look alike.

    Args:
        report: what `find_duplicates` found in the same data sets.
        dataset: a data set.
        other: another one to compare it with.

    Raises:
        UserError: ImageHash is not installed.
        AttemptError: images cannot be read.
    """
    # Hash one image of each group of equal ones of a data set.
    own = _hash_dataset(dataset)
    near = find_near_matches(own.hashes)
    report = report._replace(
        near_copies=_describe_pairs(near, (dataset, own.ids), (dataset, own.ids)),
        notes=[*report.notes, *own.notes],
    )
    if other is None:
        return report

    # Images that are in the other data set are leaks already.
    others = _hash_dataset(other)
    is_new = ~np.isin(own.ids, _find_leaked_ids(dataset, other))
    new_ids = own.ids[is_new]
    near = find_near_matches(own.hashes[is_new], others.hashes)
    return report._replace(
        near_leaks=_describe_pairs(near, (dataset, new_ids), (other, others.ids)),
        notes=[*report.notes, *others.notes],
    )


def _hash_dataset(dataset: HashedSet) -> _HashedImages:
    """Hash the images, without those that equal an earlier one."""
    hash_row = partial(_hash_row, load_perceptual_hash(), dataset.manifest.reading)
    manifest = dataset.manifest
    is_kept = np.ones(manifest.num_rows, bool)
    pixel_hashes = manifest.pixel_hashes
    if check_hashes(dataset) is None and pixel_hashes is not None:
        equal = find_equal_images([pixel_hashes])
        is_first = np.append(True, np.diff(equal.groups) > 0)[: len(equal.ids)]
        is_kept[equal.ids[~is_first]] = False

    reader = Dataset(
        dataset.store,
        manifest,
        memory_bytes=_MEMORY_BYTES,
        retry_seconds=RETRY_SECONDS,
    )
    hashes = list[int | None]()
    ids = np.flatnonzero(is_kept)
    group_ends = np.cumsum(manifest.rows_per_group)
    # One row group at a time, in as many threads as memory allows: only the hashes are
    # kept.
    for group_ids in np.split(ids, np.searchsorted(ids, group_ends[:-1])):
        rows = reader.read_rows(group_ids)
        max_pixels = max((math.prod(row.image_size) for row in rows), default=0)
        with ThreadPoolExecutor(count_decoding_threads(max_pixels)) as pool:
            hashes.extend(pool.map(hash_row, rows))

    # Images that do not decode have no hash. That of a plain image is nearly zero, so
    # that all of them would look alike.
    decoded = [i for i, value in enumerate(hashes) if value is not None]
    values = np.array([value for value in hashes if value is not None], np.uint64)
    is_plain = np.bitwise_count(values) <= _MAX_DISTANCE
    num_plain = int(np.count_nonzero(is_plain))
    notes = []
    if num_plain:
        images = "plain image" if num_plain == 1 else "plain images"
        notes.append(
            f"{num_plain:,} {images} of {dataset.url}, such as of one color, not "
            "compared by looks: their perceptual hashes are all alike"
        )
    return _HashedImages(ids[decoded][~is_plain], values[~is_plain], notes)


def _hash_row(
    perceptual_hash: Callable[[Any], Any], reading: int, row: Row
) -> int | None:
    try:
        image = open_rgb(bytes(row.data), _MAX_PIXELS, reading)
    except BadImageError:
        return None
    bits = np.packbits(perceptual_hash(image).hash)
    return int.from_bytes(bits.tobytes(), "big")


def _find_leaked_ids(dataset: HashedSet, other: HashedSet) -> NDArray[np.int64]:
    """Return the ids of images that equal one of the other data set."""
    own_hashes = dataset.manifest.pixel_hashes
    other_hashes = other.manifest.pixel_hashes
    assert own_hashes is not None, "hashes were checked"
    assert other_hashes is not None, "hashes were checked"
    equal = find_equal_images([own_hashes, other_hashes])
    is_own = equal.ids < len(own_hashes)
    is_leaked = is_own & np.isin(equal.groups, equal.groups[~is_own])
    return equal.ids[is_leaked]


def find_near_pairs(
    hashes: NDArray[np.uint64],
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield the indices of all pairs of hashes that differ in at most 3 bits.

    The search is exact. A pair may come more than once.

    Args:
        hashes: shape (n,).
    """
    for band in range(_NUM_BANDS):
        # Sort by one band: hashes that have it in common lie beside each other.
        keys = (hashes >> np.uint64(_BAND_BITS * band)).astype(np.uint16)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        values = hashes[order]
        # Compare each hash with the one that is `offset` places after it, while any
        # two have the band in common.
        firsts = np.arange(len(order))
        offset = 1
        while len(firsts):
            firsts = firsts[firsts + offset < len(order)]
            firsts = firsts[keys[firsts + offset] == keys[firsts]]
            seconds = firsts + offset
            distances = np.bitwise_count(values[firsts] ^ values[seconds])
            is_near = distances <= _MAX_DISTANCE
            yield order[firsts[is_near]], order[seconds[is_near]]
            offset += 1


def find_near_matches(
    hashes: NDArray[np.uint64], other_hashes: NDArray[np.uint64] | None = None
) -> NDArray[np.int64]:
    """Return for each hash the index of another one that is near, or -1.

    Args:
        hashes: hashes of a data set.
        other_hashes: those of the data set to look in; by default the same one.
    """
    # Compare each value once: frames of a video, say, may have one in common by the
    # thousand, whose pairs would be millions.
    targets = hashes if other_hashes is None else other_hashes
    values, value_ids = np.unique(
        np.concatenate([hashes, targets]), return_inverse=True
    )
    own_ids = value_ids[: len(hashes)]
    target_ids = value_ids[len(hashes) :]

    # The first and the last index in `targets` of each value, or -1. Of indices that
    # stand twice, numpy keeps the last.
    last = np.full(len(values), -1)
    last[target_ids] = np.arange(len(targets))
    first = np.full(len(values), -1)
    first[target_ids[::-1]] = np.arange(len(targets))[::-1]

    # Mark the values that are near another one.
    near_of_value = np.full(len(values), -1)
    for ids, other_ids in find_near_pairs(values):
        for here, there in ((ids, other_ids), (other_ids, ids)):
            has_target = last[there] >= 0
            near_of_value[here[has_target]] = last[there[has_target]]

    # An equal value is nearer, unless it is the hash itself.
    near: NDArray[np.int64] = near_of_value[own_ids]
    for equal in (first[own_ids], last[own_ids]):
        is_match = equal >= 0
        if other_hashes is None:
            is_match &= equal != np.arange(len(hashes))
        near = np.where(is_match, equal, near)
    return near


def _describe_pairs(
    near: NDArray[np.int64],
    own: tuple[HashedSet, NDArray[np.int64]],
    other: tuple[HashedSet, NDArray[np.int64]],
) -> Matches:
    """Count images that have a near one, and name some.

    Args:
        near: index in `other` of an image that is near, for each image of `own`, or -1.
        own: a data set, and the sample ids of its images.
        other: the data set of the images that are near, and their sample ids.
    """
    found = np.flatnonzero(near >= 0)
    shown = found[:MAX_EXAMPLES]
    is_across = other[0] is not own[0]
    urls = [own[0].url, other[0].url] if is_across else [own[0].url]
    titles = make_titles(urls)
    own_names = _read_names(own[0], own[1][shown])
    other_names = _read_names(other[0], other[1][near[shown]])
    examples = [
        f"{titles[0]}{name} ~ {titles[-1]}{other_name}"
        for name, other_name in zip(own_names, other_names, strict=True)
    ]
    return Matches(len(found), examples)


def _read_names(dataset: HashedSet, sample_ids: NDArray[np.int64]) -> list[str]:
    store = open_shard_store(dataset.manifest, dataset.store)
    samples, _ = name_samples(store, dataset.manifest, sample_ids)
    return [sample.name for sample in samples]
