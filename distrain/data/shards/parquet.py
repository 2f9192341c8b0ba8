"""Parquet by byte ranges: where a column of a row group lies in its file, and the group read from such ranges."""

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
_TAIL_BYTES = 1 << 16

Footer: TypeAlias = Any  # pq.FileMetaData, which has no types


class DamagedParquetError(ValueError):
    """These bytes are not what their place in a Parquet file says."""


class ByteRange(NamedTuple):
    """A byte range of a file, read."""

    start: int
    data: bytes | memoryview


class ColumnNames(NamedTuple):
    """Which columns hold images and labels, as Parquet names them."""

    image: str
    """Of bytes: `image.bytes` in the hub's layout."""
    label: str


class HubFeatures(NamedTuple):
    """What a file says of itself in the hub's metadata."""

    columns: ColumnNames
    classes: tuple[str, ...] | None
    """Names by label, where they are given."""


def read_footer(
    store: Store, path: str, file_size: int, retry_seconds: float
) -> tuple[int, bytes]:
    """A file's footer: where it starts, and its bytes to the end of the file.

    Raises:
        OSError: it cannot be read.
        UserError: this is no Parquet file.
    """
    start = max(0, file_size - _TAIL_BYTES)
    tail = store.read(path, start, file_size, retry_seconds=retry_seconds)
    if len(tail) < 12 or tail[-4:] != _MAGIC:
        raise UserError(
            f"{store.redacted_url}/{path} is no whole Parquet file: it is cut, or something else"
        )
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if length > file_size:
        raise UserError(f"{store.redacted_url}/{path} has a damaged footer")
    if length > len(tail):
        tail = store.read(
            path, file_size - length, file_size, retry_seconds=retry_seconds
        )
    return file_size - length, tail[-length:]


def parse_footer(data: bytes) -> Footer:
    """Read a footer; what stands before it in a file is not looked at. Raises DamagedError."""
    try:
        return pq.read_metadata(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise DamagedParquetError(f"damaged footer: {error}") from None


def find_column_chunk(footer: Footer, group_index: int, column: str) -> tuple[int, int]:
    """The bytes of a file, from and to, that hold a column of a row group."""
    row_group = footer.row_group(group_index)
    for i in range(row_group.num_columns):
        found = row_group.column(i)
        if found.path_in_schema == column:
            start = found.data_page_offset
            if found.dictionary_page_offset:
                start = min(start, found.dictionary_page_offset)
            return start, start + found.total_compressed_size
    raise AssertionError(column)


def get_uncompressed_bytes(footer: Footer, group_index: int, column: str) -> int:
    """How many bytes a column of a row group says it unpacks to."""
    row_group = footer.row_group(group_index)
    columns = [row_group.column(i) for i in range(row_group.num_columns)]
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == column)


def has_dictionary(footer: Footer, group_index: int, column: str) -> bool:
    """Whether values of a column of a row group may be stored once and repeated."""
    row_group = footer.row_group(group_index)
    columns = [row_group.column(i) for i in range(row_group.num_columns)]
    return any(
        c.path_in_schema == column and c.dictionary_page_offset is not None
        for c in columns
    )


def read_row_group(
    ranges: Sequence[ByteRange],
    file_size: int,
    footer: Footer,
    group_index: int,
    columns: Sequence[str],
) -> pa.Table:
    """Columns of a row group of a file of `size` bytes, from the pieces that hold them. Raises DamagedError."""
    try:
        # Buffered ahead, it would read what lies between columns too.
        file = pq.ParquetFile(
            pa.PythonFile(_RangeFile(ranges, file_size), "r"),
            metadata=footer,
            pre_buffer=False,
        )
        return file.read_row_group(
            group_index, columns=list(columns), use_threads=False
        )
    except (pa.ArrowException, OSError) as error:
        raise DamagedParquetError(f"damaged row group: {error}") from None


def view_binary_column(column: pa.ChunkedArray) -> tuple[NDArray[np.uint8], list[int]]:
    """Values of a column of bytes, or of its field `bytes`: value i is data[offsets[i]:offsets[i + 1]]."""
    array = (
        column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    )  # which copies even one
    if pa.types.is_struct(array.type):
        array = array.field("bytes")
    if array.type not in (pa.binary(), pa.string()):
        array = array.cast(pa.binary())
    _, offsets, values = array.buffers()
    return (
        np.frombuffer(values, np.uint8) if values else np.empty(0, np.uint8),
        np.frombuffer(offsets, np.int32)[
            array.offset : array.offset + len(array) + 1
        ].tolist(),
    )


def find_features(
    footer: Footer,
    file_name: str,
    image_column: str | None = None,
    label_column: str | None = None,
) -> HubFeatures:
    """Find the columns of images and labels: those named, those of the hub's metadata, or `image` and `label`.

    Raises:
        UserError: there are none, or several.
    """
    schema = footer.schema.to_arrow_schema()
    told = _read_hub_features(footer)
    image_column = image_column or _pick_column(told, "Image", "image", file_name)
    label_column = label_column or _pick_column(told, "ClassLabel", "label", file_name)
    missing = [
        name for name in (image_column, label_column) if name not in schema.names
    ]
    if missing:
        raise UserError(
            f"{file_name} has no column {missing[0]}: name the columns with --image-column and --label-column; "
            f"it has {', '.join(schema.names)}"
        )
    if not pa.types.is_integer(schema.field(label_column).type):
        raise UserError(
            f"column {label_column} of {file_name} holds no numbers: labels are integers from 0"
        )
    kind = schema.field(image_column).type
    if pa.types.is_struct(kind) and any(
        kind.field(i).name == "bytes" for i in range(kind.num_fields)
    ):
        image_column = f"{image_column}.bytes"
    elif not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(
            f"column {image_column} of {file_name} holds no image files: its type is {kind}"
        )
    names = (
        told.get(label_column, {}).get("names")
        if isinstance(told.get(label_column), dict)
        else None
    )
    return HubFeatures(
        ColumnNames(image_column, label_column),
        tuple(map(str, names)) if isinstance(names, list) else None,
    )


def _read_hub_features(footer: Footer) -> dict[str, dict[str, object]]:
    try:
        found = json.loads(footer.metadata[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):  # none, or not theirs
        return {}
    return found if isinstance(found, dict) else {}


def _pick_column(
    hub_features: dict[str, dict[str, object]],
    feature_type: str,
    default: str,
    file_name: str,
) -> str:
    """The one column of a kind, or the usual name."""
    found = [
        name
        for name, feature in hub_features.items()
        if isinstance(feature, dict) and feature.get("_type") == feature_type
    ]
    if len(found) > 1 and default not in found:
        raise UserError(
            f"{file_name} has several columns of {default}s, {', '.join(found)}: choose with --{default}-column"
        )
    return default if default in found or not found else found[0]


class _RangeFile:
    """A file of `size` bytes of which only some pieces are there; pyarrow reads it without a copy."""

    closed = False

    def __init__(self, ranges: Sequence[ByteRange], size: int) -> None:
        self._ranges = [(piece.start, memoryview(piece.data)) for piece in ranges]
        self._size, self._position = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def size(self) -> int:
        return self._size

    def read(self, n: int) -> memoryview:
        at, self._position = self._position, self._position + n
        for start, data in self._ranges:
            if start <= at < start + len(data):
                return data[at - start : at - start + n]
        raise AssertionError("read outside the window")

    def close(self) -> None:
        self.closed = True

    def flush(self) -> None:
        pass
