"""Which samples virtual worker v sees at step t of epoch e: a pure function of (seed, e, v, t) and the row groups.

Per epoch: row groups are permuted and joined to one line of kept rows; the line is cut into V equal segments, one a
virtual worker; inside a segment, blocks of a fixed number of rows are shuffled. So a virtual worker reads row groups
one after another (sequential ranged reads), holds about one block of rows, and nothing depends on ranks.
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
    """The whole state of the data: the next step to deliver is `step` of `epoch` (both from 0)."""

    epoch: int
    step: int


class _EpochOrder(NamedTuple):
    """The kept rows of an epoch, in the order of its permuted row groups."""

    group_order: IntArray  # (groups,) which group stands at each place
    row_ends: IntArray  # (groups,) kept rows up to and including each place
    left_out_ids: IntArray  # (remainder,) sample ids left out this epoch, ascending


@dataclass(frozen=True, eq=False)
class SampleOrder:
    """The order of samples. A sample id is its row in the manifest's row groups, counted through."""

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
    _epoch_orders: dict[int, _EpochOrder] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.num_rows < self.global_batch_size:
            raise UserError(
                f"the data set has {self.num_rows} samples, fewer than one global batch of {self.global_batch_size}: "
                "lower global_batch or add data"
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
        """Steps of one epoch."""
        return self.num_rows // self.global_batch_size

    @property
    def num_left_out(self) -> int:
        """Samples left out of each epoch: fewer than one global batch."""
        return self.num_rows % self.global_batch_size

    @cached_property
    def group_starts(self) -> IntArray:
        """The first sample id of each row group, shape (groups,)."""
        return np.cumsum(self.rows_per_group) - self.rows_per_group

    def get_cursor(self, step: int) -> Cursor:
        """The cursor before the run's step number `step` (from 0, counted through all epochs)."""
        return Cursor(*divmod(step, self.steps_per_epoch))

    def get_sample_ids(self, cursor: Cursor, virtual_worker: int) -> IntArray:
        """Sample ids of one micro-batch, shape (b,)."""
        segment = self.steps_per_epoch * self.micro_batch_size
        first = cursor.step * self.micro_batch_size
        last = first + self.micro_batch_size
        parts = []
        for block in range(first // self.block_rows, (last - 1) // self.block_rows + 1):
            start = block * self.block_rows
            rows = min(self.block_rows, segment - start)
            shuffled = _shuffle_block(
                rows, self.seed, cursor.epoch, virtual_worker, block
            )
            parts.append(start + shuffled[max(first - start, 0) : last - start])
        # place: (b,) places inside the virtual worker's segment
        place = np.concatenate(parts)
        return self._find_sample_ids(
            self._get_epoch_order(cursor.epoch), virtual_worker * segment + place
        )

    def find_row_groups(self, sample_ids: IntArray) -> IntArray:
        """The row group of each sample id, same shape."""
        return np.searchsorted(self.group_starts, sample_ids, side="right") - 1

    def get_left_out_ids(self, epoch: int) -> IntArray:
        """Sample ids left out of an epoch, ascending: a window that slides over one permutation fixed for the run.

        So no sample is left out twice before all have been once, and no class is hit (sorted data included).
        """
        window = (
            epoch * self.num_left_out + np.arange(self.num_left_out)
        ) % self.num_rows
        return np.sort(self._left_out_permutation[window])

    @cached_property
    def _left_out_permutation(self) -> IntArray:
        return draw_permutation(
            self.num_rows if self.num_left_out else 0, self.seed, Purpose.LEFT_OUT
        )

    def _get_epoch_order(self, epoch: int) -> _EpochOrder:
        if epoch not in self._epoch_orders:
            left_out = self.get_left_out_ids(epoch)
            # kept: (groups,) rows of each group that are not left out
            kept = self.rows_per_group - np.bincount(
                self.find_row_groups(left_out), minlength=len(self.rows_per_group)
            )
            groups = draw_permutation(
                len(self.rows_per_group), self.seed, Purpose.ROW_GROUPS, epoch
            )
            self._epoch_orders.clear()
            self._epoch_orders[epoch] = _EpochOrder(
                groups, np.cumsum(kept[groups]), left_out
            )
        return self._epoch_orders[epoch]

    def _find_sample_ids(
        self, epoch_order: _EpochOrder, positions: IntArray
    ) -> IntArray:
        """Sample ids at places of the line, same shape."""
        index = np.searchsorted(epoch_order.row_ends, positions, side="right")
        before = np.where(index > 0, epoch_order.row_ends[index - 1], 0)
        start = self.group_starts[epoch_order.group_order[index]]
        # rank: place among all kept ids in ascending order; the id is that plus the left-out ids below it
        rank = (
            start
            - np.searchsorted(epoch_order.left_out_ids, start)
            + (positions - before)
        )
        return rank + np.searchsorted(
            epoch_order.left_out_ids - np.arange(len(epoch_order.left_out_ids)),
            rank,
            side="right",
        )


@lru_cache(maxsize=1024)
def _shuffle_block(
    num_rows: int, seed: int, epoch: int, virtual_worker: int, block: int
) -> IntArray:
    return draw_permutation(
        num_rows, seed, Purpose.SHUFFLE_BLOCK, epoch, virtual_worker, block
    )
