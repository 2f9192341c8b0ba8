"""Prepare and examine data sets by URL: what the data commands do, without a terminal.

Functions and arguments have the names of the commands and their options.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from distrain.data.prepare.decode_memory import FULL_PIXEL_BYTES
from distrain.data.prepare.index import (
    IndexResult,
    compute_color_statistics,
    index_dataset,
)
from distrain.data.prepare.open import open_source
from distrain.data.prepare.pack import PackResult, pack_dataset
from distrain.data.prepare.pack_options import (
    DEFAULT_PIXEL_LIMIT,
    Geometry,
    PackOptions,
)
from distrain.data.prepare.pack_split import (
    check_fraction,
    get_split_targets,
    pack_split,
)
from distrain.data.prepare.source import DatasetProgress, ImageSource, Reject
from distrain.data.shards.manifest import MANIFEST_FILE, Manifest
from distrain.data.shards.stats import ColorStatistics
from distrain.data.storage.store import Store
from distrain.distributed.process import (
    count_available_cores,
    count_available_memory,
)
from distrain.errors import UserError

# Measured peaks of a process that decodes, in bytes: without images, and per pixel of
# the largest image, if it is resized before all else.
_PROCESS_BYTES = 200 << 20
_RESIZED_PIXEL_BYTES = 8


def _ignore(_: DatasetProgress) -> None:
    """Do nothing with the progress."""


def _to_url(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


def _check_positive(name: str, value: int) -> None:
    """Raise UserError if an argument is below 1."""
    if value < 1:
        raise UserError(f"{name} {value} is not valid: use at least 1")


def _get_num_processes(processes: int | None, image_bytes: int) -> int:
    """Return the number of processes, by default one per core that memory allows.

    Args:
        processes: the caller's choice, which memory does not limit.
        image_bytes: peak memory of a process while it works on the largest image.

    Raises:
        UserError: the caller's choice is below 1.
    """
    if processes is None:
        process_bytes = _PROCESS_BYTES + image_bytes
        num_fitting = count_available_memory() // process_bytes
        return max(1, min(count_available_cores(), num_fitting))
    _check_positive("processes", processes)
    return processes


def _note_memory_limit(
    source: ImageSource, processes: int | None, num_processes: int
) -> None:
    """Add a note to a source if memory allows fewer processes than there are cores."""
    num_cores = count_available_cores()
    if processes is None and num_processes < num_cores:
        memory = count_available_memory() / 2**30
        source.notes.append(
            f"{num_processes} of {num_cores} cores are used, since {memory:.1f} GiB of "
            "memory may not hold the largest images that are allowed for more: lower "
            "the pixel limit, or set the number of processes"
        )


class StatsResult(NamedTuple):
    """Result of `stats`."""

    statistics: ColorStatistics
    rejects: list[Reject]
    """Images that were left out, such as those that do not decode."""


def pack(
    source: str | Path,
    target: str | Path,
    *,
    val: float | None = None,
    val_dst: str | Path | None = None,
    geometry: str = "square:256",
    encoding: Literal["jpeg", "raw"] = "jpeg",
    quality: int = 95,
    labels: str | Path | None = None,
    names: str | Path | None = None,
    classes_of: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    pixel_limit: int = DEFAULT_PIXEL_LIMIT,
    processes: int | None = None,
    on_source: Callable[[ImageSource], None] | None = None,
    on_progress: Callable[[DatasetProgress], None] | None = None,
    log: Callable[[str], None] | None = None,
) -> PackResult:
    """Decode, check, resize and shard images for training.

    Call it again after an interruption: finished shards are kept.

    Args:
        source: folder with one subfolder of images per class, .tar or .parquet file,
            folder of those, or pattern with `*` (path or URL).
        target: output folder for the shards (path or URL).
        val: fraction of the images that are for validation, such as 0.1, in every
            class alike. Each image's own bytes decide, so that more images, or other
            names, change nothing; images of equal pixels follow the first of them. It
            takes one more pass over the images.
        val_dst: folder for those; `target` then has the others. Default: `train` and
            `val` in `target`.
        geometry: stored size. keep: as is; short:N: short side of N pixels; square:N:
            short side N, then the center N x N.
        encoding: jpeg, or raw for uncompressed pixels (square geometry only).
        quality: JPEG quality, 1 to 100.
        labels: labels for a folder or .tar of bare images: a list, or the ILSVRC-2012
            devkit.
        names: readable class names: a file, or that devkit.
        classes_of: data set whose classes and numbers to take, matched by name: the
            training set's, for a validation set.
        image_column: Parquet column of the images. Default: from the metadata.
        label_column: Parquet column of the labels. Default: from the metadata.
        pixel_limit: images of more than this many pixels are rejected.
        processes: decoding processes. Default: one per core, or fewer if the memory
            that the process may use does not hold the largest images. They import the
            main script again: unless this is 1, a script must call this function
            below `if __name__ == "__main__":`.
        on_source: called once the source is open, before any image is read.
        on_progress: called before the first image and after every shard.
        log: gets a line if a write to the target fails and is retried.

    Returns:
        The manifest, and what was rejected, by name and with the reason; with `val`,
        those of the training set, and the validation set's in the field `val`.

    Raises:
        UserError: the source holds nothing to train on, an option is wrong, or the
            target holds another data set or pack, is in the folder of the images, or
            cannot be written to.
        RunError: a process was killed.
        OSError: reading or writing fails for longer than a minute.
    """
    # Check the options before the source is listed, which may take minutes.
    _check_positive("pixel_limit", pixel_limit)
    if val is not None:
        check_fraction(val)
    elif val_dst is not None:
        raise UserError(
            f"there are no images for {Store(str(val_dst)).redacted_url}: set the "
            "fraction for validation, such as --val 0.1 (val), or leave out --val-dst "
            "(val_dst)"
        )
    options = PackOptions(Geometry.from_text(geometry), encoding, quality, pixel_limit)
    is_resized = options.geometry.kind != "keep"
    pixel_bytes = _RESIZED_PIXEL_BYTES if is_resized else FULL_PIXEL_BYTES
    num_processes = _get_num_processes(processes, pixel_bytes * pixel_limit)
    opened = open_source(
        str(source),
        labels_url=_to_url(labels),
        names_url=_to_url(names),
        classes_url=_to_url(classes_of),
        image_column=image_column,
        label_column=label_column,
    )
    _note_memory_limit(opened.source, processes, num_processes)
    if on_source is not None:
        on_source(opened.source)
    if val is not None:
        return pack_split(
            opened.source,
            get_split_targets(str(target), _to_url(val_dst)),
            val,
            options,
            num_processes=num_processes,
            on_progress=on_progress or _ignore,
            log=log,
        )
    return pack_dataset(
        opened.source,
        str(target),
        options,
        num_processes=num_processes,
        on_progress=on_progress or _ignore,
        log=log,
    )


def index(
    source: str | Path,
    *,
    to: str | Path | None = None,
    labels: str | Path | None = None,
    names: str | Path | None = None,
    classes_of: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    pixel_limit: int = DEFAULT_PIXEL_LIMIT,
    processes: int | None = None,
    on_source: Callable[[ImageSource], None] | None = None,
    on_progress: Callable[[DatasetProgress], None] | None = None,
) -> IndexResult:
    """Index existing Parquet or WebDataset shards, to train on them in place.

    Decodes every image once and writes a manifest; copies nothing.

    Args:
        source: folder, file or pattern of .parquet or .tar shards (path or URL).
        to: folder for the manifest, if that of the shards is read-only.
        labels: see `pack`.
        names: see `pack`.
        classes_of: see `pack`.
        image_column: see `pack`.
        label_column: see `pack`.
        pixel_limit: see `pack`.
        processes: see `pack`.
        on_source: see `pack`.
        on_progress: called before the first image and after every row group.

    Returns:
        The manifest, and what was rejected, by name and with the reason.

    Raises:
        UserError: the source cannot be trained on in place, its URL contains a secret
            that the manifest would store, the folder has a manifest already or cannot
            be written to, no image decodes, or an option is wrong.
        RunError: a process was killed.
        OSError: reading or writing fails for longer than a minute.
    """
    # Check the options before the source is listed.
    _check_positive("pixel_limit", pixel_limit)
    num_processes = _get_num_processes(processes, FULL_PIXEL_BYTES * pixel_limit)
    opened = open_source(
        str(source),
        labels_url=_to_url(labels),
        names_url=_to_url(names),
        classes_url=_to_url(classes_of),
        image_column=image_column,
        label_column=label_column,
    )
    _note_memory_limit(opened.source, processes, num_processes)
    if on_source is not None:
        on_source(opened.source)
    return index_dataset(
        opened.source,
        opened.columns,
        _to_url(to),
        num_processes=num_processes,
        pixel_limit=pixel_limit,
        on_progress=on_progress or _ignore,
    )


def stats(
    url: str | Path,
    *,
    labels: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    processes: int | None = None,
    on_source: Callable[[ImageSource], None] | None = None,
    on_progress: Callable[[DatasetProgress], None] | None = None,
) -> StatsResult:
    """Return the color statistics of a data set.

    Those of a packed or indexed data set are in its manifest. Of any other source that
    `pack` reads, every image is decoded to compute them.

    Args:
        url: data set or source (path or URL).
        labels: see `pack`.
        image_column: see `pack`.
        label_column: see `pack`.
        processes: see `pack`.
        on_source: called if images have to be read, once their source is open.
        on_progress: called before the first image and then regularly.

    Raises:
        UserError: there are no images, none decodes, or an option does not apply.
        RunError: a process was killed.
        OSError: reading fails for longer than a minute.
    """
    num_processes = _get_num_processes(
        processes, FULL_PIXEL_BYTES * DEFAULT_PIXEL_LIMIT
    )
    # Ask for a manifest first: a data set may be named like an archive.
    if "*" not in str(url):
        store = Store(str(url))
        if store.exists(MANIFEST_FILE):
            if labels or image_column or label_column:
                raise UserError(
                    f"{store.redacted_url} has its statistics in its manifest: leave "
                    "out labels, image_column and label_column"
                )
            return StatsResult(Manifest.load(store).statistics, [])

    source, _ = open_source(
        str(url),
        labels_url=_to_url(labels),
        image_column=image_column,
        label_column=label_column,
    )
    _note_memory_limit(source, processes, num_processes)
    if on_source is not None:
        on_source(source)
    statistics, rejects = compute_color_statistics(
        source,
        num_processes=num_processes,
        on_progress=on_progress or _ignore,
    )
    return StatsResult(statistics, rejects)
