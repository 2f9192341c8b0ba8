"""Images without labels, from anything that `pack` reads, and single files."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import numpy as np

# Each of these modules registers the kind of file that it opens.
from distrain.data.prepare import archive, hub_parquet  # noqa: F401
from distrain.data.prepare.class_folders import has_image_name
from distrain.data.prepare.hub_features import find_image_path
from distrain.data.prepare.image_folder import check_file, list_files
from distrain.data.prepare.row_group_reader import RowGroupReader
from distrain.data.prepare.row_groups import list_row_groups
from distrain.data.prepare.shard_names import (
    get_shard_extension,
    is_shard_name,
    select_shards,
)
from distrain.data.prepare.source import (
    RETRY_SECONDS,
    Block,
    FileReader,
    Reject,
    Sample,
)
from distrain.data.prepare.tar_listing import list_members
from distrain.data.prepare.tar_members import (
    LABEL_EXTENSIONS,
    get_extension,
    to_block,
)
from distrain.data.shards.dataset import Dataset
from distrain.data.shards.manifest import MANIFEST_FILE
from distrain.data.shards.parquet import ColumnNames, parse_footer, read_footer
from distrain.data.storage.store import Store
from distrain.errors import UserError


def iter_unlabeled(url: str) -> Iterator[Sample | Reject]:
    """Read the images at a path or URL one by one; their label is -1.

    Args:
        url: an image file, a folder with images at any depth, a .tar or .parquet file
            or a folder of those, a pattern with `*` for some files of a folder, or a
            packed or indexed data set.

    Returns:
        Each image file, or a reject with the reason, in the order of names or rows.
        They are read as they are asked for.

    Raises:
        UserError: there is nothing.
        OSError: it cannot be read.
    """
    url = url.rstrip("/") or "/"
    store = Store(url)
    if store.exists(MANIFEST_FILE):
        return _add_location(store, _iter_dataset(url))

    # A pattern, or a single file.
    parent, _, name = url.rpartition("/")
    parent_store = Store(parent or ("/" if url.startswith("/") else "."))
    if "*" in name:
        return _iter_pattern(parent_store, name)
    if not store.is_folder(""):
        if not parent_store.exists(name):
            raise UserError(f"nothing at {store.redacted_url}: check the path")
        if is_shard_name(name):
            return _add_location(parent_store, _iter_shards(parent_store, [name]))
        return _iter_file(parent_store, name, store.redacted_url)

    # A folder of shards, or of images.
    shards, _ = select_shards(store.list_entries(), store.redacted_url)
    if shards:
        names = [shard.name for shard in shards]
        return _add_location(store, _iter_shards(store, names))
    files, rejects = list_files(store)
    images = [(path, entry) for path, entry in files if has_image_name(path)]
    if not images and not rejects:
        raise UserError(f"no images in {store.redacted_url}: check the path")
    blocks = [check_file(entry, path, label=-1) for path, entry in images]
    return _add_location(store, _read_blocks(store, [*rejects, *blocks]))


def _add_location(
    store: Store, items: Iterator[Sample | Reject]
) -> Iterator[Sample | Reject]:
    """Put the folder as the user gave it before the names."""
    folder = store.redacted_url
    for item in items:
        name = item.name if folder == "." else f"{folder.rstrip('/')}/{item.name}"
        yield item._replace(name=name)


def _iter_pattern(store: Store, pattern: str) -> Iterator[Sample | Reject]:
    """Read the files of a folder whose names match a pattern.

    Raises:
        UserError: there are none.
    """
    entries = [
        entry
        for entry in store.list_entries()
        if fnmatchcase(entry.name, pattern) and not entry.is_folder
    ]
    if not entries:
        raise UserError(f"no file matches {store.redacted_url}/{pattern}")
    shards, _ = select_shards(entries, store.redacted_url)
    if shards:
        names = [shard.name for shard in shards]
        return _add_location(store, _iter_shards(store, names))
    blocks = [check_file(entry, entry.name, label=-1) for entry in entries]
    return _add_location(store, _read_blocks(store, blocks))


def _iter_file(store: Store, name: str, shown: str) -> Iterator[Sample]:
    yield Sample(shown, -1, store.read(name, retry_seconds=RETRY_SECONDS))


def _iter_dataset(url: str) -> Iterator[Sample | Reject]:
    dataset = Dataset.open(url)
    for sample_id in range(len(dataset)):
        name = dataset.describe_sample(sample_id)
        if sample_id in dataset.bad_samples:
            yield Reject(name, dataset.bad_samples[sample_id])
            continue
        (row,) = dataset.read_rows(np.array([sample_id]))
        yield Sample(name, -1, bytes(row.data))


def _iter_shards(store: Store, names: Sequence[str]) -> Iterator[Sample | Reject]:
    for name in names:
        if get_shard_extension(name) == "parquet":
            yield from _iter_parquet(store, name)
        else:
            yield from _iter_tar(store, name)


def _iter_tar(store: Store, path: str) -> Iterator[Sample | Reject]:
    """Read the images of an archive, and of archives in it, without labels."""
    members, rejects = list_members(store, path)
    inner_archives = [member for member in members if is_shard_name(member.name)]
    for inner_archive in inner_archives:
        inner_members, inner_rejects = list_members(store, path, inner_archive)
        members = [*members, *inner_members]
        rejects += inner_rejects
    blocks = [
        to_block(path, member, label=-1)
        for member in members
        if has_image_name(member.name)
        and get_extension(member.name) not in LABEL_EXTENSIONS
        and member not in inner_archives
    ]
    yield from _read_blocks(store, [*rejects, *blocks])


def _iter_parquet(store: Store, path: str) -> Iterator[Sample | Reject]:
    """Read the images of a Parquet file, whatever labels it has."""
    size = store.get_size(path)
    _, data = read_footer(store, path, size, RETRY_SECONDS)
    footer = parse_footer(data)
    image_path = find_image_path(footer, path, notes=[])
    # The column of labels is not read.
    columns = ColumnNames(image_path, image_path)
    reader = RowGroupReader(store.url, columns, {}, {path: size})
    for block in list_row_groups(path, footer, columns, size):
        if isinstance(block, Reject):
            yield block
            continue
        rows = reader.read_unlabeled(block)
        yield from [rows] if isinstance(rows, Reject) else rows


def _read_blocks(
    store: Store, blocks: Sequence[Block | Reject]
) -> Iterator[Sample | Reject]:
    """Read blocks that are one image file each."""
    reader = FileReader(store.url)
    for block in blocks:
        if isinstance(block, Reject):
            yield block
            continue
        rows = reader.read_block(block)
        yield from [rows] if isinstance(rows, Reject) else rows
