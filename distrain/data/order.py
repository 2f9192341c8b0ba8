"""Order of samples: which ones virtual worker v sees at step t of epoch e.

A pure function of (seed, e, v, t) and the sizes of the row groups. Per epoch: the
rows that do not fill a global batch are left out (other ones each epoch); the row
groups are permuted and their other rows, the kept ones, concatenated; the result is cut
into V equal segments, one per virtual worker; inside a segment, blocks of a fixed
number of rows are shuffled. So a virtual worker reads row groups one after another
(sequential ranged reads) and holds about one block of rows, and nothing depends on the
number of ranks.
"""

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrain.errors import UserError
from distrain.philox import Purpose, draw_permutation

IntArray = NDArray[np.int64]


class Cursor(NamedTuple):
    """Position in the data, which is all the state that the input has.

    `step` of `epoch` is delivered next; both count from 0.
    """

    epoch: int
    step: int


class _EpochOrder(NamedTuple):
    """Kept rows of an epoch, in the order of its permuted row groups."""

    group_order: IntArray
    """Row groups in the order of this epoch, shape (groups,)."""
    row_ends: IntArray
    """Cumulative number of kept rows after each group of `group_order`, same shape."""
    left_out_ids: IntArray
    """Sample ids left out of this epoch, ascending, shape (num_left_out,)."""


@dataclass(frozen=True, eq=False)
class SampleOrder:
    """Order of the samples of a run.

    A sample id is the sample's row number, counted over the manifest's row groups.
    """

    rows_per_group: IntArray
    """Rows of each row group, shape (groups,)."""
    seed: int
    """32-bit seed of the run."""
    num_virtual_workers: int
    """V."""
    micro_batch_size: int
    """b, samples of one virtual worker in one step."""
    block_rows: int
    """Rows of one shuffled block."""
    # Holds the latest epoch only.
    _epoch_orders: dict[int, _EpochOrder] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.num_rows < self.global_batch_size:
            raise UserError(
                f"the data set has {self.num_rows} samples, fewer than one global "
                f"batch of {self.global_batch_size}: lower global_batch or add data"
            )

    @cached_property
    def num_rows(self) -> int:
        """N, samples in the data set."""
        return int(self.rows_per_group.sum())

    @property
    def global_batch_size(self) -> int:
        """V * b, samples of one step."""
        return self.num_virtual_workers * self.micro_batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch, floor(N / (V * b))."""
        return self.num_rows // self.global_batch_size

    @property
    def num_left_out(self) -> int:
        """Samples left out of each epoch: fewer than one global batch."""
        return self.num_rows % self.global_batch_size

    @cached_property
    def group_starts(self) -> IntArray:
        """First sample id of each row group, shape (groups,)."""
        return np.cumsum(self.rows_per_group) - self.rows_per_group

    def get_cursor(self, step: int) -> Cursor:
        """Return the cursor before step `step` of the run, counted over all epochs."""
        return Cursor(*divmod(step, self.steps_per_epoch))

    def get_sample_ids(self, cursor: Cursor, virtual_worker: int) -> IntArray:
        """Return the sample ids of one micro-batch, shape (b,)."""
        segment_rows = self.steps_per_epoch * self.micro_batch_size
        first = cursor.step * self.micro_batch_size
        end = first + self.micro_batch_size

        # Collect the positions in the segment from all blocks that the micro-batch
        # overlaps. The last block of a segment may be shorter.
        first_block = first // self.block_rows
        last_block = (end - 1) // self.block_rows
        chunks = []
        for block in range(first_block, last_block + 1):
            start = block * self.block_rows
            num_rows = min(self.block_rows, segment_rows - start)
            shuffled = _shuffle_block(
                num_rows, self.seed, cursor.epoch, virtual_worker, block
            )
            first_in_block = max(first - start, 0)
            chunks.append(start + shuffled[first_in_block : end - start])

        # Translate them to positions in the epoch, and those to sample ids.
        positions = virtual_worker * segment_rows + np.concatenate(chunks)
        return self._find_sample_ids(self._get_epoch_order(cursor.epoch), positions)

    def find_row_groups(self, sample_ids: IntArray) -> IntArray:
        """Return the row group of each sample id, same shape."""
        return np.searchsorted(self.group_starts, sample_ids, side="right") - 1

    def get_left_out_ids(self, epoch: int) -> IntArray:
        """Return the sample ids left out of an epoch, ascending.

        They are a window that slides over one permutation, which is fixed for the run.
        So no sample is left out twice before every sample has been left out once. The
        permutation is random, so no class is left out more often than by chance, even
        if the data are sorted by class.
        """
        offsets = epoch * self.num_left_out + np.arange(self.num_left_out)
        return np.sort(self._left_out_permutation[offsets % self.num_rows])

    @cached_property
    def _left_out_permutation(self) -> IntArray:
        num_drawn = self.num_rows if self.num_left_out else 0
        return draw_permutation(num_drawn, self.seed, Purpose.LEFT_OUT)

    def _get_epoch_order(self, epoch: int) -> _EpochOrder:
        if epoch not in self._epoch_orders:
            left_out_ids = self.get_left_out_ids(epoch)
            num_groups = len(self.rows_per_group)
            left_out_per_group = np.bincount(
                self.find_row_groups(left_out_ids), minlength=num_groups
            )
            kept_per_group = self.rows_per_group - left_out_per_group
            group_order = draw_permutation(
                num_groups, self.seed, Purpose.ROW_GROUPS, epoch
            )
            row_ends = np.cumsum(kept_per_group[group_order])
            # Forget the previous epoch, to bound the memory.
            self._epoch_orders.clear()
            self._epoch_orders[epoch] = _EpochOrder(group_order, row_ends, left_out_ids)
        return self._epoch_orders[epoch]

    def _find_sample_ids(
        self, epoch_order: _EpochOrder, positions: IntArray
    ) -> IntArray:
        """Return the sample ids at positions of the epoch's kept rows, same shape."""
        # Find the row group that holds each position, and its first sample id.
        row_ends = epoch_order.row_ends
        index = np.searchsorted(row_ends, positions, side="right")
        rows_before = np.where(index > 0, row_ends[index - 1], 0)
        group_start = self.group_starts[epoch_order.group_order[index]]

        # Index of the sample among all kept ids, in ascending order.
        left_out_ids = epoch_order.left_out_ids
        kept_before_group = group_start - np.searchsorted(left_out_ids, group_start)
        kept_index = kept_before_group + (positions - rows_before)

        # The id is that index plus the number of left-out ids below the id. Left-out id
        # number i has left_out_ids[i] - i kept ids below it.
        kept_below = left_out_ids - np.arange(len(left_out_ids))
        return kept_index + np.searchsorted(kept_below, kept_index, side="right")


@lru_cache(maxsize=1024)
def _shuffle_block(
    num_rows: int, seed: int, epoch: int, virtual_worker: int, block: int
) -> IntArray:
    # Cached, since each step takes only a micro-batch of a block.
    return draw_permutation(
        num_rows, seed, Purpose.SHUFFLE_BLOCK, epoch, virtual_worker, block
    )
