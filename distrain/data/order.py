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
from distrain.philox import Purpose, permutation

Ids = NDArray[np.int64]


class Cursor(NamedTuple):
    """The whole state of the data: the next step to deliver is `step` of `epoch` (both from 0)."""

    epoch: int
    step: int


class _Line(NamedTuple):
    """The kept rows of an epoch, in the order of its permuted row groups."""

    groups: Ids  # (groups,) which group stands at each place
    ends: Ids  # (groups,) kept rows up to and including each place
    left_out: Ids  # (remainder,) sample ids left out this epoch, ascending


@dataclass(frozen=True, eq=False)
class Order:
    """The order of samples. A sample id is its row in the manifest's row groups, counted through."""

    group_rows: Ids
    """Rows of each row group, shape (groups,)."""
    seed: int
    """32-bit seed of the run."""
    virtual_workers: int
    """V."""
    micro_batch: int
    """b, samples of one virtual worker in one step."""
    block_rows: int
    """Rows of one shuffled block."""
    _lines: dict[int, _Line] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.rows < self.global_batch:
            raise UserError(
                f"the data set has {self.rows} samples, fewer than one global batch of {self.global_batch}: "
                "lower global_batch or add data"
            )

    @cached_property
    def rows(self) -> int:
        """N, samples in the data set."""
        return int(self.group_rows.sum())

    @property
    def global_batch(self) -> int:
        """V * b, samples of one step."""
        return self.virtual_workers * self.micro_batch

    @property
    def steps(self) -> int:
        """Steps of one epoch."""
        return self.rows // self.global_batch

    @property
    def remainder(self) -> int:
        """Samples left out of each epoch: fewer than one global batch."""
        return self.rows % self.global_batch

    @cached_property
    def group_starts(self) -> Ids:
        """The first sample id of each row group, shape (groups,)."""
        return np.cumsum(self.group_rows) - self.group_rows

    def cursor(self, step: int) -> Cursor:
        """The cursor before the run's step number `step` (from 0, counted through all epochs)."""
        return Cursor(*divmod(step, self.steps))

    def ids(self, cursor: Cursor, virtual_worker: int) -> Ids:
        """Sample ids of one micro-batch, shape (b,)."""
        segment = self.steps * self.micro_batch
        first = cursor.step * self.micro_batch
        last = first + self.micro_batch
        parts = []
        for block in range(first // self.block_rows, (last - 1) // self.block_rows + 1):
            start = block * self.block_rows
            rows = min(self.block_rows, segment - start)
            shuffled = _block(rows, self.seed, cursor.epoch, virtual_worker, block)
            parts.append(start + shuffled[max(first - start, 0) : last - start])
        # place: (b,) places inside the virtual worker's segment
        place = np.concatenate(parts)
        return self._at(self._line(cursor.epoch), virtual_worker * segment + place)

    def groups_of(self, ids: Ids) -> Ids:
        """The row group of each sample id, same shape."""
        return np.searchsorted(self.group_starts, ids, side="right") - 1

    def left_out(self, epoch: int) -> Ids:
        """Sample ids left out of an epoch, ascending: a window that slides over one permutation fixed for the run.

        So no sample is left out twice before all have been once, and no class is hit (sorted data included).
        """
        window = (epoch * self.remainder + np.arange(self.remainder)) % self.rows
        return np.sort(self._leaving[window])

    @cached_property
    def _leaving(self) -> Ids:
        return permutation(
            self.rows if self.remainder else 0, self.seed, Purpose.LEFT_OUT
        )

    def _line(self, epoch: int) -> _Line:
        if epoch not in self._lines:
            left_out = self.left_out(epoch)
            # kept: (groups,) rows of each group that are not left out
            kept = self.group_rows - np.bincount(
                self.groups_of(left_out), minlength=len(self.group_rows)
            )
            groups = permutation(len(self.group_rows), self.seed, Purpose.GROUPS, epoch)
            self._lines.clear()
            self._lines[epoch] = _Line(groups, np.cumsum(kept[groups]), left_out)
        return self._lines[epoch]

    def _at(self, line: _Line, place: Ids) -> Ids:
        """Sample ids at places of the line, same shape."""
        index = np.searchsorted(line.ends, place, side="right")
        before = np.where(index > 0, line.ends[index - 1], 0)
        start = self.group_starts[line.groups[index]]
        # rank: place among all kept ids in ascending order; the id is that plus the left-out ids below it
        rank = start - np.searchsorted(line.left_out, start) + (place - before)
        return rank + np.searchsorted(
            line.left_out - np.arange(len(line.left_out)), rank, side="right"
        )


@lru_cache(maxsize=1024)
def _block(rows: int, seed: int, epoch: int, virtual_worker: int, block: int) -> Ids:
    return permutation(rows, seed, Purpose.BLOCK, epoch, virtual_worker, block)
