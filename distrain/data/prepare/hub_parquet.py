"""Parquet files of images and labels as a source.

Images are bytes, lists of bytes, or the hub's struct<bytes, path>; labels are integers,
text or booleans.
"""

import zlib
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from distrain.data.decoding.file_formats import name_stand_in
from distrain.data.prepare.class_numbers import (
    LabelValue,
    note_lookalikes,
    number_classes,
)
from distrain.data.prepare.hub_features import HubFeatures, find_features
from distrain.data.prepare.label_values import LabelColumn, iter_values
from distrain.data.prepare.row_group_reader import RowGroupReader
from distrain.data.prepare.row_groups import explain_oversize, list_row_groups
from distrain.data.prepare.source import (
    RETRY_SECONDS,
    Block,
    ImageSource,
    OpenedSource,
    Reject,
    SourceOptions,
    register_opener,
)
from distrain.data.prepare.splits import is_split_folder
from distrain.data.shards.parquet import (
    IS_ENCRYPTED,
    Footer,
    OversizeError,
    find_column_chunk,
    find_leaves,
    get_statistics_range,
    is_signed,
    parse_footer,
    read_footer,
)
from distrain.data.shards.parquet_pages import DamagedParquetError
from distrain.data.storage.backend import DirectoryEntry
from distrain.data.storage.store import Store
from distrain.errors import UserError

_NUM_THREADS = 16
_SPLIT_COLUMN = "split"
# What stands in the place of a file is told by its first bytes.
_STAND_IN_BYTES = 1 << 10


@register_opener("parquet")
def open_parquet(
    store: Store, files: Sequence[DirectoryEntry], options: SourceOptions
) -> OpenedSource:
    """Open Parquet files in the hub's layout; each row group is a block.

    Raises:
        UserError: the files do not hold labeled images, or not all of one kind.
        OSError: they cannot be read.
    """
    sizes = {
        file.name: store.get_size(file.name) if file.size is None else file.size
        for file in files
    }

    # Read all footers in threads: one or two requests per file.
    def read_file_footer(name: str) -> bytes:
        try:
            _, data = read_footer(store, name, sizes[name], RETRY_SECONDS)
        except UserError:
            _check_stand_in(store, name, sizes[name])
            raise
        return data

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        footer_data = dict(zip(sizes, pool.map(read_file_footer, sizes), strict=True))
    footers = {
        name: _parse_file_footer(store, name, data)
        for name, data in footer_data.items()
    }

    # A file without rows may have any columns, unless there is no other.
    footers = {
        name: footer for name, footer in footers.items() if _has_rows(footer)
    } or footers

    # List the row groups, which depend on footers alone.
    features = _find_common_features(store, footers, options)
    columns = features.columns
    blocks: list[Block] = []
    rejects: list[Reject] = []
    for name, footer in footers.items():
        for block in list_row_groups(name, footer, columns, sizes[name]):
            if isinstance(block, Reject):
                rejects.append(block)
            else:
                blocks.append(block)

    _check_one_split(store, footers, sizes, blocks)

    # Without class names in the metadata, all labels must be read.
    classes = features.classes or ()
    number_by_value: Mapping[LabelValue, int] = {i: i for i in range(len(classes))}
    notes = list(features.notes)
    if not blocks and not rejects:
        notes.append("its Parquet files have no rows")
    labels = LabelColumn(store, sizes, footers, columns.label)
    if blocks and classes:
        labels.check_labeled(blocks)
        notes += note_lookalikes(classes)
    elif blocks:
        values = labels.read_values(blocks)
        location = store.redacted_url
        if len(files) == 1:
            location = f"{location}/{files[0].name}"
        numbering = number_classes(values, location)
        classes = numbering.classes
        number_by_value = numbering.number_by_value
        notes += numbering.notes

    reader = RowGroupReader(store.url, columns, number_by_value, sizes)
    # A file with other contents, or other columns, makes another plan.
    details = [columns, [zlib.crc32(data) for data in footer_data.values()]]
    source = ImageSource(
        store, "Parquet", classes, blocks, reader, rejects, details, notes
    )
    return OpenedSource(source, columns)


def _has_rows(footer: Footer) -> bool:
    return any(footer.row_group(g).num_rows for g in range(footer.num_row_groups))


def _check_one_split(
    store: Store,
    footers: Mapping[str, Footer],
    sizes: Mapping[str, int],
    blocks: Sequence[Block],
) -> None:
    """Raise UserError if a column says that rows are of several splits.

    The statistics in the footers tell, as a rule, so that nothing is read.
    """

    def find_values(block: Block) -> Collection[Any]:
        footer = footers[block.path]
        if not _has_text_column(footer, _SPLIT_COLUMN):
            return ()
        bounds = get_statistics_range(footer, block.row_group, _SPLIT_COLUMN)
        if bounds is None:
            return _read_splits(store, block, footer, sizes[block.path])
        return bounds

    splits: dict[str, str] = {}
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for block, values in zip(blocks, pool.map(find_values, blocks), strict=True):
            for value in values:
                if isinstance(value, str) and is_split_folder(value):
                    splits.setdefault(value, block.path)
    if len(splits) > 1:
        raise UserError(
            f"{store.redacted_url} holds rows of several splits "
            f"({', '.join(sorted(splits))}) by its column {_SPLIT_COLUMN}, such as "
            f"{next(iter(splits.values()))}: write each split into files of its own"
        )


def _has_text_column(footer: Footer, column: str) -> bool:
    """Return whether a file has one column of a name, of text or bytes."""
    leaves = [footer.schema.column(leaf) for leaf in find_leaves(footer, column)]
    return [(leaf.path, leaf.physical_type) for leaf in leaves] == [
        (column, "BYTE_ARRAY")
    ]


def _read_splits(
    store: Store, block: Block, footer: Footer, file_bytes: int
) -> set[Any]:
    """Read the values of a row group's column of splits. Raises UserError, OSError."""
    values: set[Any] = set()
    try:
        start, end = find_column_chunk(footer, block.row_group, _SPLIT_COLUMN)
        if not 0 <= start <= end <= file_bytes:
            raise DamagedParquetError("it lies outside the file")
        for found in iter_values(store, block, _SPLIT_COLUMN, footer, file_bytes):
            values.update(found)
    except (DamagedParquetError, OversizeError) as error:
        reason = str(error)
        if isinstance(error, OversizeError):
            reason = explain_oversize(error)
        raise UserError(
            f"{store.redacted_url}/{block.path} has a column {_SPLIT_COLUMN} that "
            f"cannot be read ({reason}): download it again, or leave that column out"
        ) from None
    return values


def _check_stand_in(store: Store, name: str, num_bytes: int) -> None:
    """Raise UserError if a file is an error page, or a pointer of Git LFS."""
    end = min(num_bytes, _STAND_IN_BYTES)
    stand_in = name_stand_in(store.read(name, 0, end, retry_seconds=RETRY_SECONDS))
    if stand_in:
        raise UserError(
            f"{store.redacted_url}/{name} is not a Parquet file, but {stand_in}"
        )


def _parse_file_footer(store: Store, name: str, data: bytes) -> Footer:
    try:
        footer = parse_footer(data)
    except DamagedParquetError as error:
        raise UserError(
            f"{store.redacted_url}/{name} cannot be read ({error}): download it again"
        ) from None
    if is_signed(footer, data):
        raise UserError(f"{store.redacted_url}/{name} {IS_ENCRYPTED}")
    return footer


def _find_common_features(
    store: Store, footers: Mapping[str, Footer], options: SourceOptions
) -> HubFeatures:
    """Return the columns and classes of the files. Raises UserError if they differ."""
    common: HubFeatures | None = None
    common_name = ""
    for name, footer in footers.items():
        features = find_features(
            footer,
            f"{store.redacted_url}/{name}",
            options.image_column,
            options.label_column,
        )
        if common is None:
            common = features
            common_name = name
        if features[:2] != common[:2]:
            raise UserError(
                f"{store.redacted_url}: {name} has other columns or class names than "
                f"{common_name}: take files of one kind"
            )
        # A file whose labels are all missing may have any type.
        if common.label_kind is None:
            common = common._replace(label_kind=features.label_kind)
            common_name = name
        if features.label_kind not in (None, common.label_kind):
            raise UserError(
                f"{store.redacted_url}: labels are {features.label_kind} in {name} and "
                f"{common.label_kind} in {common_name}: store them in one type"
            )
    assert common is not None
    return common
