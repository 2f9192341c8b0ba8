"""Parquet files in the hub's layout as a source.

Columns are `image` (struct<bytes, path>, or bytes) and `label` (int).
"""

import threading
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from distrain.data.prepare.source import (
    MAX_FILE_BYTES,
    RETRY_SECONDS,
    Block,
    BlockRows,
    ImageSource,
    OpenedSource,
    Reject,
    Sample,
    SourceOptions,
    name_classes_by_number,
    register_opener,
)
from distrain.data.shards.parquet import (
    ByteRange,
    ColumnNames,
    DamagedParquetError,
    Footer,
    HubFeatures,
    find_column_chunk,
    find_features,
    get_uncompressed_bytes,
    has_dictionary,
    parse_footer,
    read_footer,
    read_row_group,
    view_binary_column,
)
from distrain.data.storage.backend import DirectoryEntry
from distrain.data.storage.store import Store
from distrain.errors import UserError

MAX_SOURCE_GROUP_BYTES = 1 << 30
"""Bytes that a column of a row group may unpack to; one that claims more is rejected
before it is read."""
MAX_SOURCE_GROUP_ROWS = 1 << 20
"""Rows that a row group may have."""
_NUM_THREADS = 16
_MAX_CACHED_FOOTERS = 8


class RowGroupReader:
    """Reader of blocks that are one row group each."""

    def __init__(
        self,
        url: str,
        columns: ColumnNames,
        num_classes: int,
        file_bytes: dict[str, int],
    ) -> None:
        """Create a reader.

        Args:
            url: folder of the files.
            columns: columns of images and labels.
            num_classes: a row with a label from here on is rejected.
            file_bytes: size of each file.
        """
        self._init_args = (url, columns, num_classes, file_bytes)
        self._store = Store(url)
        self.columns = columns
        self._num_classes = num_classes
        self._file_bytes = file_bytes
        self._footers: OrderedDict[str, Footer] = OrderedDict()
        self._lock = threading.Lock()

    # Stores, locks and footers stay in their process: another one opens its own.
    def __reduce__(
        self,
    ) -> tuple[type["RowGroupReader"], tuple[str, ColumnNames, int, dict[str, int]]]:
        return RowGroupReader, self._init_args

    def get_footer(self, path: str) -> Footer:
        """Return a file's footer, read on first use. Raises OSError."""
        # Several threads call this. Two may read the same footer, which is harmless.
        footer = self._footers.get(path)
        if footer is not None:
            return footer
        size = self._file_bytes[path]
        try:
            _, data = read_footer(self._store, path, size, RETRY_SECONDS)
            footer = parse_footer(data)
        except (DamagedParquetError, UserError) as error:
            # It was whole when the source was opened.
            raise OSError(
                f"{self._store.redacted_url}/{path} changed since it was opened: "
                f"{error}"
            ) from None
        with self._lock:
            self._footers[path] = footer
            # Row groups are read in a random order of files, and a parsed footer is
            # large: keep a few, evict the oldest.
            if len(self._footers) > _MAX_CACHED_FOOTERS:
                self._footers.popitem(last=False)
        return footer

    def read_block(self, block: Block) -> BlockRows:
        """Read the rows of a row group. Raises OSError."""
        ranges = [self.read_column(block, column) for column in self.columns]
        return self.parse_rows(block, ranges)

    def read_column(self, block: Block, column: str) -> ByteRange:
        """Read the bytes of one column of a row group. Raises OSError."""
        footer = self.get_footer(block.path)
        start, end = find_column_chunk(footer, block.row_group, column)
        data = self._store.read(block.path, start, end, retry_seconds=RETRY_SECONDS)
        return ByteRange(start, data)

    def parse_rows(self, block: Block, pieces: Sequence[ByteRange]) -> BlockRows:
        """Parse the rows of a row group whose columns were read.

        A damaged row group is rejected as a whole.
        """
        # Parse the columns, and check them against the footer.
        footer = self.get_footer(block.path)
        size = self._file_bytes[block.path]
        group_name = f"{block.name} of {block.num_rows} rows"
        try:
            table = read_row_group(pieces, size, footer, block.row_group, self.columns)
        except DamagedParquetError as error:
            return Reject(group_name, str(error))
        if table.num_rows != block.num_rows:
            reason = f"damaged row group: it has {table.num_rows} rows"
            return Reject(group_name, reason)

        # Check each row before its bytes are copied out of the column.
        image_field = self.columns.image.partition(".")[0]
        data, offsets = view_binary_column(table.column(image_field))
        labels = table.column(self.columns.label).to_pylist()
        rows: list[Sample | Reject] = []
        for i, label in enumerate(labels):
            name = f"{block.name} row {i}"
            start = offsets[i]
            end = offsets[i + 1]
            problem = self._find_row_problem(end - start, label)
            if problem is None:
                rows.append(Sample(name, label, bytes(data[start:end])))
            else:
                rows.append(Reject(name, problem))
        return rows

    def _find_row_problem(self, num_bytes: int, label: int | None) -> str | None:
        if not num_bytes:
            return "no bytes"
        if num_bytes > MAX_FILE_BYTES:
            return f"{num_bytes} bytes are over the limit of {MAX_FILE_BYTES}"
        if label is None or not 0 <= label < self._num_classes:
            return f"label {label} is not one of {self._num_classes} classes"
        return None


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
        _, data = read_footer(store, name, sizes[name], RETRY_SECONDS)
        return data

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        footer_data = dict(zip(sizes, pool.map(read_file_footer, sizes), strict=True))
    footers = {
        name: _parse_file_footer(store, name, data)
        for name, data in footer_data.items()
    }

    # List the row groups, which depend on footers alone.
    features = _find_common_features(store, footers, options)
    columns = features.columns
    blocks: list[Block] = []
    rejects: list[Reject] = []
    for name, footer in footers.items():
        for block in _list_row_groups(name, footer, columns, sizes[name]):
            if isinstance(block, Reject):
                rejects.append(block)
            else:
                blocks.append(block)

    # Without class names in the metadata, the labels must be read to count them.
    classes = features.classes
    if not classes:
        count = 1 + _find_max_label(store, sizes, footers, columns.label, blocks)
        classes = name_classes_by_number(count, store)

    reader = RowGroupReader(store.url, columns, len(classes), sizes)
    # A file with other contents, or other columns, makes another plan.
    details = [columns, [zlib.crc32(data) for data in footer_data.values()]]
    source = ImageSource(store, "Parquet", classes, blocks, reader, rejects, details)
    return OpenedSource(source, columns)


def _parse_file_footer(store: Store, name: str, data: bytes) -> Footer:
    try:
        return parse_footer(data)
    except DamagedParquetError as error:
        raise UserError(
            f"{store.redacted_url}/{name} cannot be read ({error}): download it again"
        ) from None


def _find_common_features(
    store: Store, footers: Mapping[str, Footer], options: SourceOptions
) -> HubFeatures:
    """Return the columns and classes of the files. Raises UserError if they differ."""
    common: HubFeatures | None = None
    for name, footer in footers.items():
        features = find_features(
            footer,
            f"{store.redacted_url}/{name}",
            options.image_column,
            options.label_column,
        )
        common = common or features
        if features != common:
            raise UserError(
                f"{store.redacted_url}: {name} has other columns or class names than "
                f"{next(iter(footers))}: take files of one kind"
            )
    assert common is not None
    return common


def _list_row_groups(
    name: str, footer: Footer, columns: ColumnNames, file_bytes: int
) -> list[Block | Reject]:
    """Return the row groups of a file as blocks, or why they are not read."""
    blocks: list[Block | Reject] = []
    for g in range(footer.num_row_groups):
        num_rows = footer.row_group(g).num_rows
        block_name = f"{name} row group {g}"
        reason = _explain_oversize(footer, g, num_rows, columns, file_bytes)
        if reason is not None:
            blocks.append(Reject(block_name, reason))
        elif num_rows:
            start, end = find_column_chunk(footer, g, columns.image)
            blocks.append(Block(name, block_name, -1, start, end - start, num_rows, g))
    return blocks


def _explain_oversize(
    footer: Footer,
    row_group: int,
    num_rows: int,
    columns: ColumnNames,
    file_bytes: int,
) -> str | None:
    """Return why a row group must not be read, or None.

    Its footer claims more than the limits allow, or bytes outside the file.
    """
    limit = MAX_SOURCE_GROUP_BYTES
    if not 0 <= num_rows <= MAX_SOURCE_GROUP_ROWS:
        return f"its {num_rows} rows are over the limit of {MAX_SOURCE_GROUP_ROWS}"
    for column in columns:
        start, end = find_column_chunk(footer, row_group, column)
        if not 0 <= start <= end <= file_bytes:
            return f"its column {column} lies outside the file"
        claimed = get_uncompressed_bytes(footer, row_group, column)
        if not 0 <= claimed <= limit:
            return (
                f"its {num_rows} rows claim {claimed} bytes, over the limit of {limit}"
            )
        # A dictionary stores an image once, and every row may repeat it.
        is_image_dictionary = column == columns.image and has_dictionary(
            footer, row_group, column
        )
        if is_image_dictionary and num_rows * claimed > limit:
            return (
                f"its {num_rows} rows may each repeat {claimed} bytes, over the limit "
                f"of {limit}"
            )
    return None


def _find_max_label(
    store: Store,
    file_bytes: Mapping[str, int],
    footers: Mapping[str, Footer],
    label_column: str,
    blocks: Sequence[Block],
) -> int:
    """Read the labels of all blocks, and return the largest; -1 if there are none."""
    # Only row groups that are blocks: the others are not safe to read.
    row_groups: dict[str, list[int]] = {name: [] for name in footers}
    for block in blocks:
        row_groups[block.path].append(block.row_group)

    def find_max_of_file(name: str) -> int:
        max_label = -1
        footer = footers[name]
        for g in row_groups[name]:
            start, end = find_column_chunk(footer, g, label_column)
            data = store.read(name, start, end, retry_seconds=RETRY_SECONDS)
            ranges = [ByteRange(start, data)]
            try:
                table = read_row_group(
                    ranges, file_bytes[name], footer, g, [label_column]
                )
            except DamagedParquetError as error:
                raise UserError(
                    f"{store.redacted_url}/{name} has labels that cannot be read "
                    f"({error}): download it again"
                ) from None
            labels = table.column(label_column).to_pylist()
            known_labels = [label for label in labels if label is not None]
            max_label = max([max_label, *known_labels])
        return max_label

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return max(pool.map(find_max_of_file, footers))
