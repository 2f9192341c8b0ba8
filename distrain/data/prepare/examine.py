"""Examine data sets by URL: what `verify` and `inspect` do, without a terminal.

Functions and arguments have the names of the commands and their options.
"""

from collections.abc import Callable
from pathlib import Path

from distrain.data.decoding.image import encode_png
from distrain.data.prepare.duplicates import (
    HashedSet,
    check_comparable,
    find_duplicates,
)
from distrain.data.prepare.near_duplicates import (
    add_near_duplicates,
    load_perceptual_hash,
)
from distrain.data.prepare.source import DatasetProgress
from distrain.data.prepare.verify import (
    DatasetSummary,
    VerifyResult,
    draw_contact_sheet,
    summarize_dataset,
    verify_dataset,
)
from distrain.data.shards.dataset import Dataset
from distrain.data.shards.manifest import Manifest
from distrain.data.storage.store import Store
from distrain.data.storage.url import expand_home
from distrain.errors import UserError


def _ignore(_: DatasetProgress) -> None:
    """Do nothing with the progress."""


def verify(
    url: str | Path,
    *,
    against: str | Path | None = None,
    near: bool = False,
    on_progress: Callable[[DatasetProgress], None] | None = None,
) -> VerifyResult:
    """Verify a data set: sizes, checksums, labels, and that every image decodes.

    Reads everything once, and finds images that are in it twice. Bad samples that
    `index` recorded are not problems: they have weight zero in training.

    Args:
        url: packed or indexed data set (path or URL).
        against: another one, usually the training set: images that are in both are
            found, without reading its images.
        near: also find images that look alike; reads and decodes the images of both
            data sets once more. Needs ImageHash (`pip install 'distrain[near]'`).
        on_progress: called before the first and after every shard.

    Returns:
        The problems found, how much was read, and equal images.

    Raises:
        UserError: there is no data set at a URL, or two are to be compared of which one
            has no hashes of pixels.
        AttemptError: images that are to be compared cannot be read.
    """
    dataset = _open_hashed_set(url)
    other = None if against is None else _open_hashed_set(against)
    # Say now, rather than after hours of reading, what cannot be done.
    if other is not None:
        check_comparable([dataset, other])
    if near:
        load_perceptual_hash()
    result = verify_dataset(dataset.store, dataset.manifest, on_progress or _ignore)
    duplicates = find_duplicates(dataset, other)
    if near and result.problems:
        note = f"near-duplicates were not looked for, since {dataset.url} has problems"
        duplicates = duplicates._replace(notes=[*duplicates.notes, note])
    elif near:
        duplicates = add_near_duplicates(duplicates, dataset, other)
    return result._replace(duplicates=duplicates)


def _open_hashed_set(url: str | Path) -> HashedSet:
    store = Store(str(url))
    return HashedSet(store, Manifest.load(store))


def inspect(
    url: str | Path, *, sheet: str | Path | None = None, near: bool = False
) -> DatasetSummary:
    """Summarize a data set: rows per class, sizes of its images, and equal images.

    Reads everything once.

    Args:
        url: packed or indexed data set (path or URL).
        sheet: write a contact sheet of random samples to this PNG file.
        near: also find images that look alike: see `verify`.

    Raises:
        UserError: there is no data set at the URL, or the sheet cannot be written.
        AttemptError: the images cannot be read.
    """
    # Before all of it is read, which may take hours.
    sheet = None if sheet is None else Path(expand_home(str(sheet)))
    if sheet is not None and not sheet.parent.is_dir():
        raise UserError(f"no folder {sheet.parent} for the sheet: create it")
    if sheet is not None and sheet.is_dir():
        raise UserError(f"the sheet {sheet} is a folder: name a PNG file in it")
    if near:
        load_perceptual_hash()
    dataset = Dataset.open(url)
    summary = summarize_dataset(dataset)
    hashed_set = HashedSet(Store(str(url)), dataset.manifest)
    duplicates = find_duplicates(hashed_set)
    if near:
        duplicates = add_near_duplicates(duplicates, hashed_set)
    summary = summary._replace(duplicates=duplicates)
    if sheet is not None:
        sheet.write_bytes(encode_png(draw_contact_sheet(dataset)))
    return summary
