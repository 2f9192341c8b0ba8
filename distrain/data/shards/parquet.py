"""Parquet by byte ranges: find and read parts of a file without all of it."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from distrain.data.shards.parquet_pages import DamagedParquetError, measure_pages
from distrain.data.storage.store import Store
from distrain.errors import UserError

_MAGIC = b"PAR1"
_ENCRYPTED_MAGIC = b"PARE"
# An encrypted file whose footer is readable ends it with a nonce and a tag.
_SIGNATURE_BYTES = 28
# Most footers are shorter, so that one read brings a whole one.
_TAIL_BYTES = 1 << 16
# An element of a list of bytes is unpacked with its levels and as 32 bits.
_BYTES_PER_ELEMENT = 8
# Names that a writer gives to the levels below a list, such as `list.element`.
_MAX_LIST_LEVELS = 2

IS_ENCRYPTED = "is encrypted: store it without encryption"
"""What is wrong with an encrypted file, for messages."""

# A pq.FileMetaData; pyarrow has no types.
Footer: TypeAlias = Any


class OversizeError(ValueError):
    """A column of a row group unpacks to more bytes than the limit."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(num_bytes)
        self.num_bytes = num_bytes


class ByteRange(NamedTuple):
    """A byte range of a file, read into memory."""

    start: int
    data: bytes | memoryview


class ColumnNames(NamedTuple):
    """Names of the columns of images and labels, as in Parquet's schema."""

    image: str
    """Column of bytes, `image.bytes` in the hub's layout, or of lists of bytes."""
    label: str


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
    if tail[-4:] == _ENCRYPTED_MAGIC:
        raise UserError(f"{store.redacted_url}/{path} {IS_ENCRYPTED}")
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
    # Types of other packages that are loaded, such as Ray's, raise ValueError.
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DamagedParquetError(f"damaged footer: {error}") from None


def is_signed(footer: Footer, data: bytes) -> bool:
    """Return whether a footer says that columns are encrypted, though it is not itself.

    pyarrow ends the process if such a column is looked up without a key.

    Args:
        footer: the footer.
        data: its bytes to the end of the file.
    """
    # What follows are the footer's length and the magic number.
    return bool(len(data) - 8 - footer.serialized_size == _SIGNATURE_BYTES)


def find_leaves(footer: Footer, column: str) -> list[int]:
    """Return the numbers of the stored columns that have a name.

    It is the path in Parquet's schema, or, for a list of bytes, the path of the list:
    what stands for its elements differs from writer to writer, such as
    `column.list.element`. Two columns may have one name if a name contains dots.
    """
    schema = footer.schema
    leaves = [schema.column(i) for i in range(footer.num_columns)]
    named = [i for i, leaf in enumerate(leaves) if leaf.path == column]
    return named or [i for i, leaf in enumerate(leaves) if _is_list_of(leaf, column)]


def _is_list_of(leaf: Any, column: str) -> bool:
    """Return whether a stored column holds the elements of a list."""
    if leaf.max_repetition_level != 1 or not leaf.path.startswith(f"{column}."):
        return False
    # Below the list, one or two levels are named; more are a longer name with dots.
    levels = leaf.path[len(column) + 1 :].split(".")
    return len(levels) <= _MAX_LIST_LEVELS and "" not in levels


def _find_leaf(footer: Footer, column: str) -> int:
    leaves = find_leaves(footer, column)
    # The features of a file are checked when it is opened.
    if not leaves:
        raise AssertionError(column)
    return leaves[0]


def find_column_chunk(footer: Footer, row_group: int, column: str) -> tuple[int, int]:
    """Return start and end of the bytes that hold a column of a row group."""
    chunk = footer.row_group(row_group).column(_find_leaf(footer, column))
    start = chunk.data_page_offset
    # The dictionary, if there is one, comes before the data. Offset 0 means that there
    # is none: a file begins with its magic number.
    if chunk.dictionary_page_offset:
        start = min(start, chunk.dictionary_page_offset)
    return start, start + chunk.total_compressed_size


def get_uncompressed_bytes(footer: Footer, row_group: int, column: str) -> int:
    """Return the size of a column of a row group after decompression, as it claims."""
    chunk = footer.row_group(row_group).column(_find_leaf(footer, column))
    return int(chunk.total_uncompressed_size)


def get_statistics_range(
    footer: Footer, row_group: int, column: str
) -> tuple[Any, Any] | None:
    """Return the smallest and the largest value of a column of a row group.

    None if the file has no such column, or the footer does not tell.
    """
    leaves = find_leaves(footer, column)
    if not leaves:
        return None
    statistics = footer.row_group(row_group).column(leaves[0]).statistics
    if statistics is None or not statistics.has_min_max:
        return None
    try:
        return statistics.min, statistics.max
    except UnicodeDecodeError:
        # Text that is cut within a character, or damaged.
        return None


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
        # The reader takes numbers of columns: names may be ambiguous.
        reader = _open_reader(ranges, file_size, footer)
        leaves = [_find_leaf(footer, column) for column in columns]
        return reader.read_row_group(row_group, leaves, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise DamagedParquetError(f"damaged row group: {error}") from None


def iter_column(
    column_range: ByteRange,
    file_size: int,
    footer: Footer,
    row_group: int,
    column: str,
    max_bytes: int,
) -> Iterator[pa.Array]:
    """Read a column of a row group in parts, in bounded memory whatever it claims.

    A small dictionary, or values that share a prefix, may unpack to any size, so each
    part has as few rows as keep it below a quarter of `max_bytes`.

    Args:
        column_range: the column's bytes.
        file_size: bytes of the whole file.
        footer: footer of the file.
        row_group: index of the row group in the file.
        column: name of the column.
        max_bytes: limit of the column's pages after decompression.

    Yields:
        Rows of the column; structs around it and dictionaries are removed.

    Raises:
        DamagedParquetError: the bytes are not such a column.
        OversizeError: its pages unpack to more than the limit.
    """
    # Measure the pages, before any is decompressed.
    leaf = _find_leaf(footer, column)
    leaf_schema = footer.schema.column(leaf)
    num_values = footer.row_group(row_group).column(leaf).num_values
    sizes = measure_pages(column_range.data, num_values)
    num_rows = max(1, footer.row_group(row_group).num_rows)
    unpacked_bytes = sizes.total_bytes
    if leaf_schema.max_repetition_level:
        unpacked_bytes = max(unpacked_bytes, sizes.num_values * _BYTES_PER_ELEMENT)
    # Missing values take the fixed width too.
    if leaf_schema.physical_type == "FIXED_LEN_BYTE_ARRAY":
        unpacked_bytes = max(unpacked_bytes, num_rows * leaf_schema.length)
    if unpacked_bytes > max_bytes:
        raise OversizeError(unpacked_bytes)

    # Columns of other types have been bounded by the number of their values.
    if leaf_schema.physical_type == "BYTE_ARRAY":
        max_value_bytes = max(1, sizes.max_page_bytes)
        num_rows = min(num_rows, max(1, max_bytes // 4 // max_value_bytes))
    try:
        # The reader takes numbers of columns: names may be ambiguous.
        reader = _open_reader([column_range], file_size, footer)
        for batch in reader.iter_batches(
            num_rows, [row_group], column_indices=[leaf], use_threads=False
        ):
            yield _unwrap(batch.column(0))
    except (pa.ArrowException, OSError) as error:
        raise DamagedParquetError(f"damaged row group: {error}") from None


def _open_reader(ranges: Sequence[ByteRange], file_size: int, footer: Footer) -> Any:
    # With pre_buffer, pyarrow would also read what lies between the columns.
    source = pa.PythonFile(_RangeFile(ranges, file_size), "r")
    return pq.ParquetFile(source, metadata=footer, pre_buffer=False).reader


def _unwrap(array: pa.Array) -> pa.Array:
    """Return the field `bytes` of structs, or their only field, without dictionary."""
    while pa.types.is_struct(array.type):
        array = array.field("bytes" if array.type.num_fields > 1 else 0)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    # Part of a column has the dictionary of all of it, which would count each time.
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def view_binary_column(column: pa.ChunkedArray) -> tuple[NDArray[np.uint8], list[int]]:
    """Return the bytes and the offsets of a column of bytes, or of its field `bytes`.

    Value i is data[offsets[i]:offsets[i + 1]].
    """
    # combine_chunks copies even a single chunk.
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return view_binary_array(_unwrap(array))


def view_binary_array(array: pa.Array) -> tuple[NDArray[np.uint8], list[int]]:
    """Return the bytes and the offsets of an array of bytes, or of lists of bytes.

    Value i is data[offsets[i]:offsets[i + 1]].
    """
    # Lists of bytes: Java's are signed.
    if pa.types.is_fixed_size_list(array.type):
        array = array.cast(pa.list_(array.type.value_type))
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        _, element_buffer = array.values.buffers()
        elements = np.empty(0, np.uint8)
        if element_buffer:
            elements = np.frombuffer(element_buffer, np.uint8)[array.values.offset :]
        return elements, array.offsets.to_pylist()

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
