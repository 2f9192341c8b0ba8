"""Parquet files in the hub's layout as a source of images: `image: struct<bytes, path>` or bytes, `label: int`."""

import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
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
"""Bytes that the images of a row group may unpack to; what claims more is refused before it is read."""
MAX_SOURCE_GROUP_ROWS = 1 << 20
"""Rows of a row group."""
_NUM_THREADS = 16
_MAX_CACHED_FOOTERS = 8


class RowGroupReader:
    """Reads row groups."""

    def __init__(
        self,
        url: str,
        columns: ColumnNames,
        num_classes: int,
        file_bytes: dict[str, int],
    ) -> None:
        """`sizes`: bytes of each file."""
        self._init_args = (url, columns, num_classes, file_bytes)
        self._store, self.columns, self._num_classes, self._file_bytes = (
            Store(url),
            columns,
            num_classes,
            file_bytes,
        )
        self._footers: OrderedDict[str, Footer] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(
        self,
    ) -> tuple[type["RowGroupReader"], tuple[str, ColumnNames, int, dict[str, int]]]:
        return RowGroupReader, self._init_args

    def get_footer(self, path: str) -> Footer:
        """A file's footer. Raises OSError."""
        footer = self._footers.get(path)  # several threads ask
        if footer is None:
            try:
                footer = parse_footer(
                    read_footer(
                        self._store, path, self._file_bytes[path], RETRY_SECONDS
                    )[1]
                )
            except (DamagedParquetError, UserError) as error:
                raise OSError(
                    f"{self._store.redacted_url}/{path} changed meanwhile: {error}"
                ) from None
            with self._lock:
                self._footers[path] = footer
                if len(self._footers) > _MAX_CACHED_FOOTERS:
                    self._footers.popitem(last=False)
        return footer

    def read_block(self, block: Block) -> BlockRows:
        """The rows of a group. Raises OSError."""
        pieces = [self.read_column(block, column) for column in self.columns]
        return self.parse_rows(block, pieces)

    def read_column(self, block: Block, column: str) -> ByteRange:
        """The bytes of a column of a group. Raises OSError."""
        start, end = find_column_chunk(
            self.get_footer(block.path), block.row_group, column
        )
        return ByteRange(
            start, self._store.read(block.path, start, end, retry_seconds=RETRY_SECONDS)
        )

    def parse_rows(self, block: Block, pieces: Sequence[ByteRange]) -> BlockRows:
        """The rows of a group whose columns were read; a damaged group is refused whole."""
        footer, size = self.get_footer(block.path), self._file_bytes[block.path]
        try:
            table = read_row_group(pieces, size, footer, block.row_group, self.columns)
        except DamagedParquetError as error:
            return Reject(f"{block.name} of {block.num_rows} rows", str(error))
        if table.num_rows != block.num_rows:
            return Reject(
                f"{block.name} of {block.num_rows} rows",
                f"damaged row group: it has {table.num_rows} rows",
            )
        data, offsets = view_binary_column(
            table.column(self.columns.image.partition(".")[0])
        )
        labels = table.column(self.columns.label).to_pylist()
        rows: list[Sample | Reject] = []
        for i, label in enumerate(labels):
            name = f"{block.name} row {i}"
            length = offsets[i + 1] - offsets[i]
            if not length:
                rows.append(Reject(name, "no bytes"))
            elif length > MAX_FILE_BYTES:
                rows.append(
                    Reject(
                        name, f"{length} bytes are over the limit of {MAX_FILE_BYTES}"
                    )
                )
            elif label is None or not 0 <= label < self._num_classes:
                rows.append(
                    Reject(
                        name, f"label {label} is none of {self._num_classes} classes"
                    )
                )
            else:
                rows.append(
                    Sample(name, label, bytes(data[offsets[i] : offsets[i + 1]]))
                )
        return rows


@register_opener("parquet")
def open_parquet(
    store: Store, files: Sequence[DirectoryEntry], options: SourceOptions
) -> OpenedSource:
    """Hub Parquet as a source.

    Raises:
        UserError: the files do not hold labelled images, or not all of one kind.
        OSError: they cannot be read.
    """
    sizes = {
        file.name: store.get_size(file.name) if file.size is None else file.size
        for file in files
    }

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        raw = list(
            pool.map(
                lambda name: read_footer(store, name, sizes[name], RETRY_SECONDS)[1],
                sizes,
            )
        )
    footers = [
        _parse_file_footer(store, name, data)
        for name, data in zip(sizes, raw, strict=True)
    ]
    expected: HubFeatures | None = None
    blocks, refused = list[Block](), list[Reject]()
    for name, footer in zip(sizes, footers, strict=True):
        here = find_features(
            footer,
            f"{store.redacted_url}/{name}",
            options.image_column,
            options.label_column,
        )
        expected = expected or here
        if here != expected:
            first = next(iter(sizes))
            raise UserError(
                f"{store.redacted_url}: {name} has other columns or class names than {first}: take one kind"
            )
        for g in range(footer.num_row_groups):
            block = Block(
                name, f"{name} row group {g}", -1, 0, 0, footer.row_group(g).num_rows, g
            )
            reason = _explain_oversize(footer, block, expected.columns, sizes[name])
            if reason is not None:
                refused.append(Reject(block.name, reason))
            elif block.num_rows:
                start, end = find_column_chunk(footer, g, expected.columns.image)
                blocks.append(block._replace(start=start, num_bytes=end - start))
    assert expected is not None
    classes = expected.classes or _name_classes_from_labels(
        store, sizes, footers, expected.columns.label, blocks
    )
    reader = RowGroupReader(store.url, expected.columns, len(classes), sizes)
    details = [expected.columns, [zlib.crc32(data) for data in raw]]
    return OpenedSource(
        ImageSource(store, "Parquet", classes, blocks, reader, refused, details),
        expected.columns,
    )


def _explain_oversize(
    footer: Footer, block: Block, columns: ColumnNames, file_bytes: int
) -> str | None:
    """Why a row group is not read: what its footer says of it is beyond limits, or beyond its file."""
    if not 0 <= block.num_rows <= MAX_SOURCE_GROUP_ROWS:
        return (
            f"its {block.num_rows} rows are over the limit of {MAX_SOURCE_GROUP_ROWS}"
        )
    for column in columns:
        start, end = find_column_chunk(footer, block.row_group, column)
        if not 0 <= start <= end <= file_bytes:
            return f"its column {column} lies outside the file"
        claimed = get_uncompressed_bytes(footer, block.row_group, column)
        if not 0 <= claimed <= MAX_SOURCE_GROUP_BYTES:
            return f"its {block.num_rows} rows say {claimed} bytes, over the limit of {MAX_SOURCE_GROUP_BYTES}"
        if (
            column == columns.image
            and has_dictionary(footer, block.row_group, column)
            and block.num_rows * claimed > MAX_SOURCE_GROUP_BYTES
        ):
            return f"its {block.num_rows} rows may repeat {claimed} bytes, over the limit of {MAX_SOURCE_GROUP_BYTES}"
    return None


def _parse_file_footer(store: Store, name: str, data: bytes) -> Footer:
    try:
        return parse_footer(data)
    except DamagedParquetError as error:
        raise UserError(
            f"{store.redacted_url}/{name} cannot be read ({error}): fetch it again"
        ) from None


def _name_classes_from_labels(
    store: Store,
    file_bytes: dict[str, int],
    footers: Sequence[Footer],
    label_column: str,
    blocks: Sequence[Block],
) -> tuple[str, ...]:
    """Names for labels that have none: their numbers. The columns of labels are read for it."""

    read: dict[str, set[int]] = {name: set() for name in file_bytes}
    for block in blocks:
        read[block.path].add(block.row_group)

    def find_max_label(file: tuple[str, Footer]) -> int:
        name, footer = file
        most = -1
        for g in range(footer.num_row_groups):
            if g not in read[name]:
                continue
            start, end = find_column_chunk(footer, g, label_column)
            piece = ByteRange(
                start, store.read(name, start, end, retry_seconds=RETRY_SECONDS)
            )
            try:
                labels = read_row_group(
                    [piece], file_bytes[name], footer, g, [label_column]
                ).column(label_column)
            except DamagedParquetError as error:
                raise UserError(
                    f"{store.redacted_url}/{name} has labels that cannot be read ({error}): fetch it again"
                ) from None
            most = max(
                [most, *(label for label in labels.to_pylist() if label is not None)]
            )
        return most

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        count = 1 + max(pool.map(find_max_label, zip(file_bytes, footers, strict=True)))
    return name_classes_by_number(count, store)
