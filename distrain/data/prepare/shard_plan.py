"""Plan of a pack: which rows of a source go into which shard."""

from collections.abc import Sequence
from typing import NamedTuple

from distrain.data.prepare.source import Block
from distrain.philox import Purpose, draw_permutation

# Size of an image whose source does not say it.
_TYPICAL_IMAGE_BYTES = 1 << 17


class RowRange(NamedTuple):
    """Rows of a block that belong to one shard: from start up to, but without, end."""

    block: Block
    start: int
    end: int

    @property
    def num_rows(self) -> int:
        """Number of rows in the range."""
        return self.end - self.start


def assign_rows_to_shards(
    blocks: Sequence[Block], shard_bytes: int, image_bytes: float | None
) -> list[list[RowRange]]:
    """Return the row ranges of each shard.

    Blocks are put in a random order, which makes their rows one long sequence. It is
    cut where a shard has reached its estimated size.

    Args:
        blocks: blocks of a source.
        shard_bytes: target size of a shard.
        image_bytes: estimated size of a stored image; None: as large as in the source.
    """
    shards: list[list[RowRange]] = []
    room = 0.0
    for i in draw_permutation(len(blocks), 0, Purpose.PACK).tolist():
        block = blocks[i]
        row_bytes = image_bytes
        if row_bytes is None:
            row_bytes = block.num_bytes / block.num_rows or _TYPICAL_IMAGE_BYTES
        start = 0
        while start < block.num_rows:
            # Start a shard if not even one more image fits.
            if room < row_bytes:
                shards.append([])
                room = float(shard_bytes)
            # Take as many rows as fit; at least one, for an image larger than a shard.
            num_rows = min(block.num_rows - start, max(1, int(room / row_bytes)))
            shards[-1].append(RowRange(block, start, start + num_rows))
            room -= num_rows * row_bytes
            start += num_rows
    return shards
