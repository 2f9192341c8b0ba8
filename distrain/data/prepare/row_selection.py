"""Some of a source's rows, as a source of their own."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrain.data.prepare.source import (
    Block,
    BlockReader,
    BlockRows,
    ImageSource,
    Reject,
)


class _Selection(NamedTuple):
    """Rows of a block that are selected."""

    block: Block
    """The whole block."""
    rows: NDArray[np.int32]


class SelectedRowsReader:
    """Reader of blocks, such as row groups, of which only some rows are selected."""

    def __init__(
        self, reader: BlockReader, selections: Mapping[tuple[str, int], _Selection]
    ) -> None:
        """Create a reader.

        Args:
            reader: reader of whole blocks.
            selections: by path and row group; all other blocks are read as a whole.
        """
        self._reader = reader
        self._selections = selections

    def read_block(self, block: Block) -> BlockRows:
        """Read the selected rows of a block. Raises OSError."""
        selection = self._selections.get((block.path, block.row_group))
        if selection is None:
            return self._reader.read_block(block)
        rows = self._reader.read_block(selection.block)
        if isinstance(rows, Reject):
            return rows
        return [rows[i] for i in selection.rows.tolist()]


def select_rows(source: ImageSource, is_selected: NDArray[np.bool_]) -> ImageSource:
    """Return a source of some of the rows, whose plan names all blocks.

    Args:
        source: the source, whose rejects stay.
        is_selected: for each row, in the order of the source.
    """
    blocks: list[Block] = []
    selections: dict[tuple[str, int], _Selection] = {}
    start = 0
    for block in source.blocks:
        rows = np.flatnonzero(is_selected[start : start + block.num_rows])
        start += block.num_rows
        if len(rows) == block.num_rows:
            blocks.append(block)
        elif len(rows):
            # Of its bytes, as many as its share of the rows.
            num_bytes = block.num_bytes * len(rows) // block.num_rows
            blocks.append(block._replace(num_rows=len(rows), num_bytes=num_bytes))
            key = (block.path, block.row_group)
            selections[key] = _Selection(block, rows.astype(np.int32))

    reader: BlockReader = source.reader
    if selections:
        reader = SelectedRowsReader(reader, selections)
    return replace(source, blocks=blocks, reader=reader, planned_blocks=source.blocks)
