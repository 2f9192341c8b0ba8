"""Label values of Parquet columns: what a stored label means."""

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from distrain.data.prepare.class_numbers import CONVERT, LabelValue
from distrain.data.prepare.row_groups import explain_oversize, iter_group_column
from distrain.data.prepare.source import RETRY_SECONDS, Block
from distrain.data.shards.parquet import (
    ByteRange,
    Footer,
    OversizeError,
    find_column_chunk,
    get_statistics_range,
)
from distrain.data.shards.parquet_pages import DamagedParquetError
from distrain.data.storage.store import Store
from distrain.errors import UserError

_NUM_THREADS = 16
_MAX_DISTINCT_LABELS = 1 << 20


def encode_labels(array: pa.Array) -> tuple[list[Any], list[int]]:
    """Return the distinct labels of an array, and the index of each row's label.

    A missing label is None. Whole numbers that are stored as floats are integers, and
    bytes are text. What cannot be a label stays as it is.
    """
    # Views of text would lose their missing values below.
    if pa.types.is_string_view(array.type):
        array = array.cast(pa.string())
    if pa.types.is_binary_view(array.type):
        array = array.cast(pa.binary())
    encoded = array.dictionary_encode(null_encoding="encode")
    values = [_to_label(value) for value in encoded.dictionary.to_pylist()]
    return values, encoded.indices.to_pylist()


def iter_values(
    store: Store, block: Block, column: str, footer: Footer, file_bytes: int
) -> Iterator[list[Any]]:
    """Read a column of a row group; yield the distinct labels of each of its parts.

    Raises:
        DamagedParquetError: the column is damaged.
        OversizeError: it unpacks to too much.
        OSError: it cannot be read.
    """
    start, end = find_column_chunk(footer, block.row_group, column)
    data = store.read(block.path, start, end, retry_seconds=RETRY_SECONDS)
    column_range = ByteRange(start, data)
    for array in iter_group_column(block, column, column_range, footer, file_bytes):
        yield encode_labels(array)[0]


def _to_label(value: Any) -> Any:
    # pandas writes integers as floats where some are missing, and those as NaN.
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return int(value) if value.is_integer() else value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return value


def is_missing(value: Any) -> bool:
    """Return whether a row of this value has no label."""
    return value is None or (isinstance(value, str) and not value.strip())


class LabelColumn:
    """Column of labels in the files of a source."""

    def __init__(
        self,
        store: Store,
        file_bytes: Mapping[str, int],
        footers: Mapping[str, Footer],
        column: str,
    ) -> None:
        """Find the column.

        Args:
            store: where the files are.
            file_bytes: size of each file.
            footers: footer of each file.
            column: name of the column.
        """
        self._store = store
        self._file_bytes = file_bytes
        self._footers = footers
        self._column = column

    def read_values(self, blocks: Sequence[Block]) -> set[LabelValue]:
        """Read all labels of row groups; return the distinct ones.

        Raises:
            UserError: they are damaged, or cannot be labels.
            OSError: they cannot be read.
        """
        blocks_by_file: dict[str, list[Block]] = {}
        for block in blocks:
            blocks_by_file.setdefault(block.path, []).append(block)

        def read_file_values(name: str) -> set[LabelValue]:
            values: set[LabelValue] = set()
            for block in blocks_by_file[name]:
                values |= self._read_group_values(block)
                self._check_count(values)
            return values

        all_values: set[LabelValue] = set()
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            for values in pool.map(read_file_values, blocks_by_file):
                all_values |= values
                self._check_count(all_values)
        return all_values

    def check_labeled(self, blocks: Sequence[Block]) -> None:
        """Check that labels with names are not all missing, as in a test split.

        The footers tell, as a rule, so that nothing is read.

        Raises:
            UserError: all labels are negative or missing.
            OSError: they cannot be read.
        """
        for block in blocks:
            footer = self._footers[block.path]
            bounds = get_statistics_range(footer, block.row_group, self._column)
            if bounds is None:
                values = self._read_group_values(block)
                if any(isinstance(value, int) and value >= 0 for value in values):
                    return
            elif isinstance(bounds[1], (int, float)) and bounds[1] >= 0:
                return
        raise UserError(
            f"{self._store.redacted_url} has no labels, column {self._column} holds "
            "none from 0: take a split that has, such as train or validation"
        )

    def _read_group_values(self, block: Block) -> set[LabelValue]:
        """Read the distinct labels of a row group. Raises UserError and OSError."""
        name = block.path
        values: set[LabelValue] = set()
        try:
            for found in iter_values(
                self._store,
                block,
                self._column,
                self._footers[name],
                self._file_bytes[name],
            ):
                values.update(self._check_values(name, found))
                self._check_count(values)
        except DamagedParquetError as error:
            raise UserError(
                f"{self._store.redacted_url}/{name} has labels that cannot be read "
                f"({error}): download it again"
            ) from None
        except OversizeError as error:
            raise UserError(
                f"{self._store.redacted_url}/{name} has labels that are too large "
                f"({explain_oversize(error)}): choose another column with label_column"
            ) from None
        return values

    def _check_values(self, name: str, values: Sequence[Any]) -> list[LabelValue]:
        """Return the values that are not missing. Raises UserError."""
        labels: list[LabelValue] = []
        for value in values:
            if is_missing(value):
                continue
            if not isinstance(value, (bool, int, str)):
                raise UserError(
                    f"column {self._column} of {self._store.redacted_url}/{name} has "
                    f"the label {value!r:.80}: {CONVERT}"
                )
            labels.append(value)
        return labels

    def _check_count(self, values: set[LabelValue]) -> None:
        if len(values) > _MAX_DISTINCT_LABELS:
            raise UserError(
                f"column {self._column} of {self._store.redacted_url} has more than "
                f"{_MAX_DISTINCT_LABELS:,} different labels: choose another with "
                "label_column"
            )
