"""Accumulate the gradients of virtual workers, exactly or fast, in one accumulator.

Float sums depend on their order, integer sums do not. In exact mode the loss *sum* of a
micro-batch is multiplied by 2^shift before backward, and its gradients are truncated to
int64 and added. (A power of two changes only the exponent of a float: no rounding is
added.) Once per step the sums are converted back: divided by 2^shift and by the number
of valid samples in the global batch. The means of virtual workers are never averaged:
that would give more weight to the samples of a virtual worker with fewer valid ones. In
fast mode gradients are added in floating point. The statistics of batch normalization
are added beside them, in fixed point in both modes.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from distrain.distributed.lane_pool import LanePool
from distrain.distributed.world import World

# Elements processed at a time: 256 KiB of fp32 and 512 KiB of int64 or float64 stay in
# a core's cache.
_CHUNK_ELEMENTS = 1 << 16
# Bytes per all-reduce: while one bucket travels, the one before it is converted to
# floats.
_BUCKET_BYTES = 25 << 20
# Fractional bits of a batch statistic: a resolution of 1e-9, far below the eps that is
# added to a variance. At V = 1,024 a mean square may be 8 million.
_BATCH_STAT_BITS = 30


class Totals(NamedTuple):
    """Integer sums over a global batch, each an int64 scalar on the device."""

    valid_count: Tensor
    """Valid samples."""
    violation_count: Tensor
    """Micro-batches whose loss or gradients were not finite, or outside of the range of
    the fixed-point numbers."""
    loss_sum: Tensor
    """Sum of the losses, times 2^loss_shift."""
    top1_count: Tensor
    """Valid samples whose highest logit is their label's."""
    top5_count: Tensor
    """Valid samples with their label among the five highest logits."""


class GradientAccumulator:
    """Sum of the gradients of a global batch, over virtual workers and ranks.

    Each step calls `begin_step`, `add_micro_batch` once per micro-batch, possibly from
    several threads, then `start_all_reduce` and `write_gradients`.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        num_virtual_workers: int,
        micro_batch_size: int,
        fraction_bits: int | None,
        num_batch_stats: int = 0,
    ) -> None:
        """Allocate the sums, and a `grad` for each parameter.

        Args:
            parameters: parameters to accumulate gradients for.
            num_virtual_workers: micro-batches per step, over all ranks.
            micro_batch_size: samples per micro-batch.
            fraction_bits: fractional bits of the mean loss's gradient; None for fast
                mode.
            num_batch_stats: number of batch statistics that each micro-batch adds.
        """
        self.exact = fraction_bits is not None
        # 2^shift is about 2^fraction_bits / global_batch_size (exactly, if that size is
        # a power of two), so a summed gradient is about the mean gradient times
        # 2^fraction_bits. Fast mode shifts the loss sum alone.
        bits = 48 if fraction_bits is None else fraction_bits
        global_batch_size = num_virtual_workers * micro_batch_size
        self.loss_shift = bits - math.ceil(math.log2(global_batch_size))
        self.loss_scale = 2.0**self.loss_shift if self.exact else 1.0
        """Factor on the loss sum before backward."""
        # int64 sums wrap silently. No partial sum can wrap if each of V micro-batches
        # stays below 2^63 / V.
        self._max_magnitude = 2.0**63 / num_virtual_workers
        self._num_virtual_workers = num_virtual_workers
        self._parameters = list(parameters)
        self._allocate_sums()
        self._allocate_totals(num_batch_stats)
        self._allocate_gradients()

    def _allocate_sums(self) -> None:
        """Allocate one flat tensor of sums; each parameter has a view of it."""
        first = self._parameters[0]
        self._device = first.device
        self._sizes = [p.numel() for p in self._parameters]
        dtype = torch.int64 if self.exact else first.dtype
        self._flat_sums = torch.zeros(
            sum(self._sizes),
            dtype=dtype,
            device=self._device,
        )
        self._gradient_sums = torch.split(self._flat_sums, self._sizes)
        # One lock per parameter: lanes that finish together add different parameters
        # side by side.
        self._gradient_locks = [threading.Lock() for _ in self._parameters]
        # A stale sum is that of the last step. The first micro-batch of a step
        # overwrites it, which saves zeroing it.
        self._is_stale = [True] * len(self._parameters)
        self._bucket_waits: list[Callable[[], None]] = []

    def _allocate_totals(self, num_batch_stats: int) -> None:
        """Allocate the totals, and the means of the batch statistics.

        One int64 tensor holds the totals and, behind them, the sums of the batch
        statistics in fixed point.
        """
        self._totals_lock = threading.Lock()
        self._totals = torch.zeros(
            len(Totals._fields) + num_batch_stats,
            dtype=torch.int64,
            device=self._device,
        )
        self.mean_batch_stats = torch.zeros(
            num_batch_stats,
            dtype=torch.float64,
            device=self._device,
        )
        """Mean of the batch statistics over all virtual workers, float64 of shape
        (num_batch_stats,), set by `start_all_reduce`."""

    def _allocate_gradients(self) -> None:
        """Allocate one flat gradient; each parameter's `grad` is a view of it."""
        self._flat_gradients = torch.zeros(
            sum(self._sizes),
            dtype=self._parameters[0].dtype,
            device=self._device,
        )
        views = torch.split(self._flat_gradients, self._sizes)
        for p, view in zip(self._parameters, views, strict=True):
            p.grad = view.view_as(p)

    def begin_step(self) -> None:
        """Start a step: mark all gradient sums as stale, and zero the totals."""
        self._is_stale = [True] * len(self._parameters)
        self._totals.zero_()

    def add_micro_batch(
        self,
        gradients: Sequence[Tensor],
        loss_sum: Tensor,
        valid_count: Tensor,
        top1_count: Tensor,
        top5_count: Tensor,
        batch_stats: Tensor | None = None,
    ) -> None:
        """Add a micro-batch; may be called from several threads at once.

        A micro-batch that is not finite or out of range adds zeros and counts as a
        violation. The all-reduced totals tell all ranks, so that all skip the update.

        Args:
            gradients: gradients of the loss sum times `loss_scale`, one per parameter.
            loss_sum: sum of the losses, not scaled.
            valid_count: number of valid samples.
            top1_count: valid samples whose highest logit is their label's.
            top5_count: valid samples with their label among the five highest logits.
            batch_stats: float64 of shape (num_batch_stats,); None if there are none.
        """
        # Check the range of all numbers.
        scaled = self._scale_terms(loss_sum, batch_stats)
        terms_in_range = (scaled.abs() < self._max_magnitude).all()
        is_in_range = terms_in_range & self._is_in_range(gradients)

        # Add the totals, in the order of their fields. NaN becomes a different integer
        # on each device: zero it before the conversion.
        terms = torch.where(is_in_range, scaled, 0.0).long()
        totals = Totals(
            valid_count=valid_count.long(),
            violation_count=(~is_in_range).long(),
            loss_sum=terms[0],
            top1_count=top1_count.long(),
            top5_count=top5_count.long(),
        )
        with self._totals_lock:
            self._totals += torch.cat([torch.stack(totals), terms[1:]])

        # Add the gradients. On a GPU the flag stays on the device, since reading it
        # would be a sync point: a violation adds zeros. On a CPU reading it is free.
        if self._device.type == "cuda":
            gradients = [torch.where(is_in_range, g, 0.0) for g in gradients]
        elif not is_in_range:
            return
        for i, gradient in enumerate(gradients):
            with self._gradient_locks[i]:
                self._add_gradient(i, gradient.detach().reshape(-1))

    def _scale_terms(self, loss_sum: Tensor, batch_stats: Tensor | None) -> Tensor:
        """Return loss sum and batch statistics times their fixed-point scales.

        Joined to one float64 tensor: the caller checks its range before it converts.
        """
        terms = loss_sum.double().reshape(1) * 2.0**self.loss_shift
        if batch_stats is None:
            return terms
        return torch.cat([terms, batch_stats * 2.0**_BATCH_STAT_BITS])

    def start_all_reduce(self, world: World) -> Totals:
        """All-reduce the totals, and start to all-reduce the gradients.

        On a CPU returns once the totals have arrived. On a GPU it returns at once: the
        current stream waits for them, not the host. `write_gradients` waits for the
        gradients. Called on all ranks.
        """
        # A parameter to which nothing was added in this step has the last step's sum.
        for i, gradient_sum in enumerate(self._gradient_sums):
            if self._is_stale[i]:
                gradient_sum.zero_()
        # The totals go first, so that they arrive while the gradients still travel. As
        # a copy: the result must survive the next step, which zeroes the totals.
        totals = self._totals.clone()
        wait_for_totals = world.all_reduce(totals)
        self._bucket_waits = [
            world.all_reduce(bucket)
            for bucket in self._split_into_buckets(self._flat_sums)
        ]
        wait_for_totals()
        # Convert the batch statistics back to floats.
        num_totals = len(Totals._fields)
        stat_scale = 2.0**_BATCH_STAT_BITS * self._num_virtual_workers
        self.mean_batch_stats.copy_(totals[num_totals:]).div_(stat_scale)
        return Totals(*totals[:num_totals].unbind())

    def write_gradients(self, totals: Totals, lanes: LanePool) -> None:
        """Write the gradient of the mean loss to each parameter's `grad`.

        Chunks are converted on all lanes, each bucket as soon as it has arrived.
        """
        # At least 1, against 0 / 0: a step without a valid sample fails by its totals.
        valid_count = totals.valid_count.clamp(min=1).double()

        # Lanes are threads of their own, and each thread has its own grad mode.
        @torch.no_grad()
        def write_chunk(chunks: tuple[Tensor, Tensor]) -> None:
            gradient_sum, gradient = chunks
            # In float64: fp32 would lose most bits of an int64 sum.
            mean = gradient_sum.double().div_(self.loss_scale).div_(valid_count)
            gradient.copy_(mean)

        def iter_reduced_chunks() -> Iterator[tuple[Tensor, Tensor]]:
            buckets = zip(
                self._bucket_waits,
                self._split_into_buckets(self._flat_sums),
                self._split_into_buckets(self._flat_gradients),
                strict=True,
            )
            for wait_for_bucket, sum_bucket, gradient_bucket in buckets:
                wait_for_bucket()
                sum_chunks = self._split_into_chunks(sum_bucket)
                gradient_chunks = self._split_into_chunks(gradient_bucket)
                yield from zip(sum_chunks, gradient_chunks, strict=True)

        lanes.for_each(write_chunk, iter_reduced_chunks())

    def _split_into_buckets(self, flat: Tensor) -> tuple[Tensor, ...]:
        # By the element size of the sums for all tensors, so that buckets of sums and
        # of gradients have the same elements.
        return torch.split(flat, _BUCKET_BYTES // self._flat_sums.element_size())

    def _split_into_chunks(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Split into chunks that fit a core's cache; on a GPU leave it whole."""
        if flat.device.type != "cpu":
            return (flat,)
        return torch.split(flat, _CHUNK_ELEMENTS)

    def _is_in_range(self, gradients: Sequence[Tensor]) -> Tensor:
        """Check that all elements are in range: a bool scalar on the device."""
        limit = self._max_magnitude if self.exact else math.inf
        minima = []
        maxima = []
        for gradient in gradients:
            for chunk in self._split_into_chunks(gradient.detach().reshape(-1)):
                low, high = torch.aminmax(chunk)
                minima.append(low)
                maxima.append(high)
        # NaN propagates through both, and no comparison with NaN is true.
        is_above = torch.stack(minima).min() > -limit
        is_below = torch.stack(maxima).max() < limit
        return is_above & is_below

    def _add_gradient(self, i: int, gradient: Tensor) -> None:
        """Add a flat gradient to the sum of parameter `i`, whose lock is held."""
        gradient_sum = self._gradient_sums[i]
        is_first = self._is_stale[i]
        self._is_stale[i] = False
        if not self.exact or self._device.type != "cpu":
            # `copy_` and `to` both truncate toward zero.
            if is_first:
                gradient_sum.copy_(gradient)
            else:
                gradient_sum.add_(gradient.to(gradient_sum.dtype))
            return
        # numpy converts and adds in one pass, a third faster than torch's two.
        sums = gradient_sum.numpy()
        values = gradient.numpy()
        for start in range(0, len(sums), _CHUNK_ELEMENTS):
            sum_chunk = sums[start : start + _CHUNK_ELEMENTS]
            value_chunk = values[start : start + _CHUNK_ELEMENTS]
            if is_first:
                np.copyto(sum_chunk, value_chunk, casting="unsafe")
            else:
                np.add(
                    sum_chunk,
                    value_chunk,
                    out=sum_chunk,
                    casting="unsafe",
                    dtype=np.int64,
                )
