"""Reader of row groups of Parquet files that others wrote."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from distrain.data.prepare.class_numbers import LabelValue
from distrain.data.prepare.label_values import encode_labels, is_missing
from distrain.data.prepare.row_groups import (
    WRITE_SMALLER,
    explain_oversize,
    iter_group_column,
)
from distrain.data.prepare.source import (
    MAX_FILE_BYTES,
    RETRY_SECONDS,
    Block,
    BlockRows,
    Reject,
    Sample,
)
from distrain.data.shards.parquet import (
    ByteRange,
    ColumnNames,
    Footer,
    OversizeError,
    find_column_chunk,
    find_leaves,
    parse_footer,
    read_footer,
    view_binary_array,
)
from distrain.data.shards.parquet_pages import DamagedParquetError
from distrain.data.storage.store import Store
from distrain.errors import UserError

_MAX_CACHED_FOOTERS = 8

_NO_BYTES = "no bytes"

_RowLabel: TypeAlias = int | str
"""Number of a row's class, or why it has none."""


class RowGroupReader:
    """Reader of blocks that are one row group each."""

    def __init__(
        self,
        url: str,
        columns: ColumnNames,
        number_by_value: Mapping[LabelValue, int],
        file_bytes: dict[str, int],
    ) -> None:
        """Create a reader.

        Args:
            url: folder of the files.
            columns: columns of images and labels.
            number_by_value: class of each label; a row with another one is rejected.
            file_bytes: size of each file.
        """
        self._url = url
        self._store = Store(url)
        self.columns = columns
        self._number_by_value = number_by_value
        self._file_bytes = file_bytes
        self._footers: OrderedDict[str, Footer] = OrderedDict()
        self._lock = threading.Lock()

    # Stores, locks and footers stay in their process: another one opens its own.
    def __reduce__(self) -> tuple[type["RowGroupReader"], tuple[Any, ...]]:
        arguments = (self._url, self.columns, self._number_by_value, self._file_bytes)
        return RowGroupReader, arguments

    def renumber(self, new_number_by_old: Sequence[int | None]) -> "RowGroupReader":
        """Return a reader of the same rows whose classes have other numbers.

        Args:
            new_number_by_old: new number of each class; None: its rows are rejected.
        """
        number_by_value: dict[LabelValue, int] = {}
        for value, old_number in self._number_by_value.items():
            number = new_number_by_old[old_number]
            if number is not None:
                number_by_value[value] = number
        return RowGroupReader(
            self._url, self.columns, number_by_value, self._file_bytes
        )

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

        A row group that is damaged, or unpacks to too much, is rejected as a whole.
        Raises OSError: the paths of images without bytes cannot be read.
        """
        image_range, label_range = pieces
        return self._parse(
            block, image_range, lambda: self._parse_labels(block, label_range)
        )

    def read_unlabeled(self, block: Block) -> BlockRows:
        """Read the images of a row group, each with the label -1. Raises OSError."""
        image_range = self.read_column(block, self.columns.image)
        return self._parse(block, image_range, lambda: [-1] * block.num_rows)

    def _parse(
        self,
        block: Block,
        image_range: ByteRange,
        parse_labels: Callable[[], list[_RowLabel]],
    ) -> BlockRows:
        """Return the rows of a row group, or why all of it is left out."""
        group_name = f"{block.name} of {block.num_rows} rows"
        try:
            rows = self._parse_images(block, image_range, parse_labels())
        except DamagedParquetError as error:
            return Reject(group_name, str(error), block.num_rows)
        except OversizeError as error:
            reason = f"{explain_oversize(error)}: {WRITE_SMALLER}"
            return Reject(group_name, reason, block.num_rows)
        return rows

    def _iter_arrays(
        self, block: Block, column_range: ByteRange, column: str
    ) -> Iterator[Any]:
        """Yield a column of a row group in parts."""
        footer = self.get_footer(block.path)
        size = self._file_bytes[block.path]
        return iter_group_column(block, column, column_range, footer, size)

    def _parse_labels(self, block: Block, column_range: ByteRange) -> list[_RowLabel]:
        """Return the class of each row, or why it has none."""
        labels: list[_RowLabel] = []
        for array in self._iter_arrays(block, column_range, self.columns.label):
            values, indices = encode_labels(array)
            numbers = [self._get_number(value) for value in values]
            labels.extend(numbers[i] for i in indices)
        _check_num_rows(block, len(labels))
        return labels

    def _get_number(self, value: Any) -> _RowLabel:
        """Return the number of a label's class, or why it has none."""
        if is_missing(value):
            return "no label"
        number = self._number_by_value.get(value)
        if number is not None:
            return number
        if isinstance(value, int) and value < 0:
            return f"label {value}: no label"
        return f"label {value!r:.80} is not one of {len(self._number_by_value)} classes"

    def _parse_images(
        self, block: Block, column_range: ByteRange, labels: Sequence[_RowLabel]
    ) -> list[Sample | Reject]:
        """Return the samples of a row group."""
        rows: list[Sample | Reject] = []
        for array in self._iter_arrays(block, column_range, self.columns.image):
            data, offsets = view_binary_array(array)
            if len(rows) + len(array) > len(labels):
                raise DamagedParquetError("damaged row group: it has too many images")
            # A missing value of a fixed width takes that width all the same.
            is_valid = array.is_valid().to_pylist()
            for i in range(len(array)):
                name = f"{block.name} row {len(rows)}"
                label = labels[len(rows)]
                start = offsets[i]
                end = offsets[i + 1]
                problem = _find_size_problem(end - start if is_valid[i] else 0)
                if problem is not None:
                    rows.append(Reject(name, problem))
                elif isinstance(label, str):
                    rows.append(Reject(name, label))
                else:
                    rows.append(Sample(name, label, bytes(data[start:end])))
        _check_num_rows(block, len(rows))
        return self._add_paths(block, rows)

    def _add_paths(
        self, block: Block, rows: list[Sample | Reject]
    ) -> list[Sample | Reject]:
        """Name the path of images without bytes, if the file has a column of paths."""
        has_no_bytes = [
            isinstance(row, Reject) and row.reason == _NO_BYTES for row in rows
        ]
        paths = self._read_paths(block) if any(has_no_bytes) else []
        for i, path in enumerate(paths):
            if has_no_bytes[i] and isinstance(path, str):
                name = f"{rows[i].name} ({path:.200})"
                rows[i] = Reject(name, f"{_NO_BYTES}, only a path")
        return rows

    def _read_paths(self, block: Block) -> list[object]:
        """Return the path of each row, or nothing if the file has none."""
        footer = self.get_footer(block.path)
        column = f"{self.columns.image.rpartition('.')[0]}.path"
        if len(find_leaves(footer, column)) != 1:
            return []
        start, end = find_column_chunk(footer, block.row_group, column)
        if not 0 <= start <= end <= self._file_bytes[block.path]:
            return []
        column_range = self.read_column(block, column)
        paths: list[object] = []
        for array in self._iter_arrays(block, column_range, column):
            paths.extend(array.to_pylist())
        return paths[: block.num_rows]


def _find_size_problem(num_bytes: int) -> str | None:
    if not num_bytes:
        return _NO_BYTES
    if num_bytes > MAX_FILE_BYTES:
        return f"{num_bytes} bytes are over the limit of {MAX_FILE_BYTES}"
    return None


def _check_num_rows(block: Block, num_rows: int) -> None:
    if num_rows != block.num_rows:
        raise DamagedParquetError(f"damaged row group: it has {num_rows} rows")
