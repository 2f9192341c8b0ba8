"""Pages of a Parquet column: what they unpack to, from their headers alone.

A footer may claim too little. A page's own header is what a reader allocates by.
"""

from typing import Any, NamedTuple

# Fields of the Thrift structs PageHeader, DataPageHeader(V2) and DictionaryPageHeader.
_TYPE = 1
_UNCOMPRESSED_BYTES = 2
_COMPRESSED_BYTES = 3
_DATA_HEADER = 5
_DICTIONARY_HEADER = 7
_DATA_HEADER_V2 = 8
_NUM_VALUES = 1

_DATA_PAGE = 0
_DICTIONARY_PAGE = 2
_DATA_PAGE_V2 = 3
_MAX_DEPTH = 8


class DamagedParquetError(ValueError):
    """Bytes are not what their position in a Parquet file says."""


class PageSizes(NamedTuple):
    """What the pages of a column of a row group unpack to."""

    total_bytes: int
    """Bytes of all pages after decompression."""
    max_page_bytes: int
    """Bytes of the largest page. No value is larger, wherever it is repeated."""
    num_values: int
    """Values of all pages, those that repeat a dictionary's included."""


def measure_pages(data: bytes | memoryview, num_values: int) -> PageSizes:
    """Walk the headers of the pages of a column of a row group.

    Args:
        data: the column's bytes in the file.
        num_values: values that the footer claims; what comes after them is not read.

    Raises:
        DamagedParquetError: the bytes are not such pages.
    """
    total_bytes = 0
    max_page_bytes = 0
    num_values_seen = 0
    position = 0
    while num_values_seen < num_values and position < len(data):
        # Parse the header, and find the next page.
        header, start = _parse_header(data, position)
        page_bytes = _get_int(header, _UNCOMPRESSED_BYTES)
        position = start + _get_int(header, _COMPRESSED_BYTES)
        if position > len(data):
            raise DamagedParquetError("damaged row group: a page is cut off")

        # A dictionary of more values than bytes would reserve memory for nothing.
        kind = header.get(_TYPE)
        if kind == _DICTIONARY_PAGE:
            num_entries = _get_int(_get_struct(header, _DICTIONARY_HEADER), _NUM_VALUES)
            if num_entries > page_bytes:
                raise DamagedParquetError("damaged row group: its dictionary is cut")
        elif kind == _DATA_PAGE:
            data_header = _get_struct(header, _DATA_HEADER)
            num_values_seen += _get_int(data_header, _NUM_VALUES)
        elif kind == _DATA_PAGE_V2:
            data_header = _get_struct(header, _DATA_HEADER_V2)
            num_values_seen += _get_int(data_header, _NUM_VALUES)

        total_bytes += page_bytes
        max_page_bytes = max(max_page_bytes, page_bytes)
    return PageSizes(total_bytes, max_page_bytes, num_values_seen)


def _get_int(struct: dict[int, Any], field: int) -> int:
    value = struct.get(field)
    if not isinstance(value, int) or value < 0:
        raise DamagedParquetError("damaged row group: a page has no valid header")
    return value


def _get_struct(struct: dict[int, Any], field: int) -> dict[int, Any]:
    value = struct.get(field)
    if not isinstance(value, dict):
        raise DamagedParquetError("damaged row group: a page has no valid header")
    return value


def _parse_header(
    data: bytes | memoryview, position: int
) -> tuple[dict[int, Any], int]:
    """Return the fields of the header at a position, and the position after it."""
    reader = _CompactReader(data, position)
    try:
        return reader.read_struct(0), reader.position
    except (IndexError, ValueError):
        raise DamagedParquetError(
            "damaged row group: a page has no valid header"
        ) from None


class _CompactReader:
    """Reader of Thrift's compact protocol. Raises IndexError and ValueError."""

    def __init__(self, data: bytes | memoryview, position: int) -> None:
        self._data = data
        self.position = position

    def read_struct(self, depth: int) -> dict[int, Any]:
        """Return the fields of a struct by their number."""
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while True:
            # The upper half is the distance to the last number, unless it is 0.
            head = self._read_byte()
            if head == 0:
                return fields
            number = number + (head >> 4) if head >> 4 else self._read_int()
            fields[number] = self._read_value(head & 15, depth)

    def _read_value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind == 3:
            return self._read_byte()
        if kind in (4, 5, 6):
            return self._read_int()
        if kind == 7:
            return self._skip(8)
        if kind == 8:
            return self._skip(self._read_unsigned())
        if kind in (9, 10):
            return self._skip_list(depth)
        if kind == 12:
            return self.read_struct(depth + 1)
        raise ValueError(f"type {kind}")

    def _skip_list(self, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        head = self._read_byte()
        size = head >> 4
        if size == 15:
            size = self._read_unsigned()
        for _ in range(size):
            # A boolean in a list takes a byte.
            if head & 15 in (1, 2):
                self._read_byte()
            else:
                self._read_value(head & 15, depth + 1)

    def _read_byte(self) -> int:
        value = self._data[self.position]
        self.position += 1
        return value

    def _read_unsigned(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._read_byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("too long a number")

    def _read_int(self) -> int:
        value = self._read_unsigned()
        return (value >> 1) ^ -(value & 1)

    def _skip(self, num_bytes: int) -> None:
        self.position += num_bytes
        if self.position > len(self._data):
            raise IndexError(self.position)
