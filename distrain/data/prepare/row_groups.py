"""Row groups of Parquet files that others wrote: which are read, and within limits."""

from collections.abc import Iterator
from typing import Any

from distrain.data.prepare.source import Block, Reject
from distrain.data.shards.parquet import (
    ByteRange,
    ColumnNames,
    Footer,
    OversizeError,
    find_column_chunk,
    get_uncompressed_bytes,
    iter_column,
)

MAX_SOURCE_GROUP_BYTES = 1 << 30
"""Bytes that a column of a row group may unpack to, its repeated values included; one
that has more is rejected."""
WRITE_SMALLER = "write smaller row groups"
"""What to do about a row group over the limits, for messages."""
MAX_SOURCE_GROUP_ROWS = 1 << 20
"""Rows that a row group may have."""


def list_row_groups(
    name: str, footer: Footer, columns: ColumnNames, file_bytes: int
) -> list[Block | Reject]:
    """Return the row groups of a file as blocks, or why they are not read.

    Args:
        name: path of the file in its store.
        footer: footer of the file.
        columns: columns that will be read.
        file_bytes: size of the file.
    """
    blocks: list[Block | Reject] = []
    for g in range(footer.num_row_groups):
        num_rows = footer.row_group(g).num_rows
        block_name = f"{name} row group {g}"
        reason = _explain_oversize(footer, g, num_rows, columns, file_bytes)
        if reason is not None:
            blocks.append(Reject(block_name, reason, max(1, num_rows)))
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
        return (
            f"its {num_rows} rows are over the limit of {MAX_SOURCE_GROUP_ROWS}: "
            f"{WRITE_SMALLER}"
        )
    for column in columns:
        start, end = find_column_chunk(footer, row_group, column)
        if not 0 <= start <= end <= file_bytes:
            return f"its column {column} lies outside the file"
        claimed = get_uncompressed_bytes(footer, row_group, column)
        if not 0 <= claimed <= limit:
            return (
                f"its {num_rows} rows claim {claimed} bytes, over the limit of "
                f"{limit}: {WRITE_SMALLER}"
            )
    return None


def iter_group_column(
    block: Block, column: str, column_range: ByteRange, footer: Footer, file_bytes: int
) -> Iterator[Any]:
    """Yield a column of a row group as arrays of some of its rows.

    Args:
        block: the row group.
        column: name of the column.
        column_range: the column's bytes.
        footer: footer of the file.
        file_bytes: size of the file.

    Raises:
        DamagedParquetError: the bytes are not such a column.
        OversizeError: the column unpacks to more bytes than the limit. What came before
            took less memory than that.
    """
    limit = MAX_SOURCE_GROUP_BYTES
    total_bytes = 0
    for array in iter_column(
        column_range, file_bytes, footer, block.row_group, column, limit
    ):
        total_bytes += array.nbytes
        if total_bytes > limit:
            raise OversizeError(total_bytes)
        yield array


def explain_oversize(error: OversizeError) -> str:
    """Return the reason for which a row group is rejected."""
    return (
        f"a column unpacks to at least {error.num_bytes} bytes, over the limit of "
        f"{MAX_SOURCE_GROUP_BYTES}"
    )
