"""Parquet by byte ranges: find and read parts of a file without all of it."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from distrain.data.storage.store import Store
from distrain.errors import UserError

_MAGIC = b"PAR1"
# Most footers are shorter, so that one read brings a whole one.
_TAIL_BYTES = 1 << 16

# A pq.FileMetaData; pyarrow has no types.
Footer: TypeAlias = Any


class DamagedParquetError(ValueError):
    """Bytes are not what their position in a Parquet file says."""


class ByteRange(NamedTuple):
    """A byte range of a file, read into memory."""

    start: int
    data: bytes | memoryview


class ColumnNames(NamedTuple):
    """Names of the columns of images and labels, as in Parquet's schema."""

    image: str
    """Column of bytes: `image.bytes` in the hub's layout."""
    label: str


class HubFeatures(NamedTuple):
    """Columns and classes of a file, partly from the hub's metadata in it."""

    columns: ColumnNames
    classes: tuple[str, ...] | None
    """Names by label, if the file has them."""


def read_footer(
    store: Store,
    path: str,
    file_size: int,
    retry_seconds: float,
) -> tuple[int, bytes]:
    """Read a file's footer.

    Returns:
        Offset of the footer, and its bytes to the end of the file.

    Raises:
        OSError: the file cannot be read.
        UserError: it is not a Parquet file.
    """
    # Read the end of the file; 12 bytes are two magic numbers and the footer's length.
    start = max(0, file_size - _TAIL_BYTES)
    tail = store.read(path, start, file_size, retry_seconds=retry_seconds)
    is_complete = len(tail) >= 12 and tail[-4:] == _MAGIC
    if not is_complete:
        raise UserError(
            f"{store.redacted_url}/{path} is not a complete Parquet file: "
            "it is truncated or has another format; fetch it again"
        )

    # Read the footer itself, if it is longer than that.
    footer_length = int.from_bytes(tail[-8:-4], "little") + 8
    footer_start = file_size - footer_length
    if footer_start < 0:
        raise UserError(
            f"{store.redacted_url}/{path} has a damaged footer: fetch the file again"
        )
    if footer_length > len(tail):
        tail = store.read(path, footer_start, file_size, retry_seconds=retry_seconds)
    return footer_start, tail[-footer_length:]


def parse_footer(data: bytes) -> Footer:
    """Parse a footer; bytes of the file before it are ignored.

    Raises:
        DamagedParquetError: it is not a footer.
    """
    try:
        return pq.read_metadata(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise DamagedParquetError(f"damaged footer: {error}") from None


def _list_column_chunks(footer: Footer, row_group: int, column: str) -> list[Any]:
    metadata = footer.row_group(row_group)
    columns = [metadata.column(i) for i in range(metadata.num_columns)]
    return [chunk for chunk in columns if chunk.path_in_schema == column]


def find_column_chunk(footer: Footer, row_group: int, column: str) -> tuple[int, int]:
    """Return start and end of the bytes that hold a column of a row group."""
    chunks = _list_column_chunks(footer, row_group, column)
    if not chunks:
        raise AssertionError(column)
    chunk = chunks[0]
    start = chunk.data_page_offset
    # The dictionary, if there is one, comes before the data. Offset 0 means that there
    # is none: a file begins with its magic number.
    if chunk.dictionary_page_offset:
        start = min(start, chunk.dictionary_page_offset)
    return start, start + chunk.total_compressed_size


def get_uncompressed_bytes(footer: Footer, row_group: int, column: str) -> int:
    """Return the size of a column of a row group after decompression, as it claims."""
    chunks = _list_column_chunks(footer, row_group, column)
    return sum(chunk.total_uncompressed_size for chunk in chunks)


def has_dictionary(footer: Footer, row_group: int, column: str) -> bool:
    """Return whether a column of a row group may store a value once and repeat it."""
    chunks = _list_column_chunks(footer, row_group, column)
    return any(chunk.dictionary_page_offset is not None for chunk in chunks)


def read_row_group(
    ranges: Sequence[ByteRange],
    file_size: int,
    footer: Footer,
    row_group: int,
    columns: Sequence[str],
) -> pa.Table:
    """Read columns of a row group from byte ranges of its file.

    Args:
        ranges: ranges that together hold the columns.
        file_size: bytes of the whole file.
        footer: footer of the file.
        row_group: index of the row group in the file.
        columns: names of the columns.

    Raises:
        DamagedParquetError: the bytes are not such columns.
    """
    try:
        # With pre_buffer, pyarrow would also read what lies between the columns.
        source = pa.PythonFile(_RangeFile(ranges, file_size), "r")
        file = pq.ParquetFile(source, metadata=footer, pre_buffer=False)
        return file.read_row_group(row_group, columns=list(columns), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise DamagedParquetError(f"damaged row group: {error}") from None


def view_binary_column(column: pa.ChunkedArray) -> tuple[NDArray[np.uint8], list[int]]:
    """Return the bytes and the offsets of a column of bytes, or of its field `bytes`.

    Value i is data[offsets[i]:offsets[i + 1]].
    """
    # combine_chunks copies even a single chunk.
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if pa.types.is_struct(array.type):
        array = array.field("bytes")
    # Strings have the same buffers; anything else must be cast for 32-bit offsets.
    if array.type not in (pa.binary(), pa.string()):
        array = array.cast(pa.binary())

    # View Arrow's buffers without a copy. The array may be a slice of the offsets.
    _, offset_buffer, value_buffer = array.buffers()
    data = np.empty(0, np.uint8)
    if value_buffer:
        data = np.frombuffer(value_buffer, np.uint8)
    all_offsets = np.frombuffer(offset_buffer, np.int32)
    end = array.offset + len(array) + 1
    offsets = all_offsets[array.offset : end]
    return data, offsets.tolist()


def find_features(
    footer: Footer,
    file_name: str,
    image_column: str | None = None,
    label_column: str | None = None,
) -> HubFeatures:
    """Find the columns of images and labels, and the class names.

    The columns are those given, else those in the hub's metadata, else `image` and
    `label`.

    Args:
        footer: footer of the file.
        file_name: name of the file, for messages.
        image_column: column of images, if the user names one.
        label_column: column of labels, if the user names one.

    Raises:
        UserError: a column is missing or has a wrong type, or several are possible.
    """
    # Choose the columns.
    schema = footer.schema.to_arrow_schema()
    hub_features = _read_hub_features(footer)
    if not image_column:
        image_column = _pick_column(hub_features, "Image", "image", file_name)
    if not label_column:
        label_column = _pick_column(hub_features, "ClassLabel", "label", file_name)

    # Check that they exist, and their types.
    for column in (image_column, label_column):
        if column not in schema.names:
            raise UserError(
                f"{file_name} has no column {column}: name the columns with "
                "image_column and label_column; "
                f"it has {', '.join(schema.names)}"
            )
    label_type = schema.field(label_column).type
    if not pa.types.is_integer(label_type):
        raise UserError(
            f"column {label_column} of {file_name} does not hold integers: "
            "labels must be integers from 0"
        )
    image_type = schema.field(image_column).type
    image_path = _find_bytes_path(image_column, image_type, file_name)

    columns = ColumnNames(image_path, label_column)
    return HubFeatures(columns, _find_class_names(hub_features, label_column))


def _read_hub_features(footer: Footer) -> dict[str, dict[str, object]]:
    # Any file may have this key, so the values are checked where they are used.
    try:
        tree = json.loads(footer.metadata[b"huggingface"])
        features = tree["info"]["features"]
    except (KeyError, TypeError, ValueError):
        # The file has no metadata of the hub, or something else under its key.
        return {}
    return features if isinstance(features, dict) else {}


def _pick_column(
    hub_features: dict[str, dict[str, object]],
    feature_type: str,
    default: str,
    file_name: str,
) -> str:
    """Return the column of a type, or the default name if no column has it."""
    columns = [
        name
        for name, feature in hub_features.items()
        if isinstance(feature, dict) and feature.get("_type") == feature_type
    ]
    if default in columns or not columns:
        return default
    if len(columns) > 1:
        raise UserError(
            f"{file_name} has several columns of {default}s, {', '.join(columns)}: "
            f"choose one with {default}_column"
        )
    return columns[0]


def _find_bytes_path(column: str, column_type: Any, file_name: str) -> str:
    """Return the Parquet path of the image files in a column."""
    if pa.types.is_binary(column_type):
        return column
    if pa.types.is_large_binary(column_type):
        return column
    if pa.types.is_struct(column_type):
        fields = [column_type.field(i) for i in range(column_type.num_fields)]
        if any(field.name == "bytes" for field in fields):
            return f"{column}.bytes"
    raise UserError(
        f"column {column} of {file_name} does not hold image files: "
        f"its type is {column_type}; choose another with image_column"
    )


def _find_class_names(
    hub_features: dict[str, dict[str, object]], label_column: str
) -> tuple[str, ...] | None:
    """Return the class names in the hub's metadata, if it has any."""
    label_feature = hub_features.get(label_column)
    if not isinstance(label_feature, dict):
        return None
    names = label_feature.get("names")
    return tuple(map(str, names)) if isinstance(names, list) else None


class _RangeFile:
    """A file of which only some byte ranges are in memory.

    pyarrow reads it without a copy. The methods are those of a file that it calls.
    """

    closed = False

    def __init__(self, ranges: Sequence[ByteRange], size: int) -> None:
        self._ranges = [(part.start, memoryview(part.data)) for part in ranges]
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def seek(self, offset: int, whence: int = 0) -> int:
        # In the order of os.SEEK_SET, os.SEEK_CUR and os.SEEK_END.
        origins = (0, self._position, self._size)
        self._position = offset + origins[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def size(self) -> int:
        return self._size

    def read(self, n: int) -> memoryview:
        start = self._position
        self._position += n
        for range_start, data in self._ranges:
            offset = start - range_start
            if 0 <= offset < len(data):
                return data[offset : offset + n]
        raise AssertionError("read outside the byte ranges")

    def close(self) -> None:
        self.closed = True

    def flush(self) -> None:
        pass
