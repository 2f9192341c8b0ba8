"""Adds up the gradients of virtual workers: exact in fixed point, or fast in floating point, in one accumulator.

Float sums depend on their order, integer sums do not. In exact mode the loss *sum* of a micro-batch is multiplied by
2^shift before backward (a power of two leaves every fp32 and bf16 gradient bit-equal up to the exponent), gradients are
truncated to int64, added, and turned back once a step: divided by 2^shift and by the number of valid samples in the
global batch. No mean of means. The moments of batch normalisation travel beside them, in fixed point in both modes.
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

# Elements worked on at a time: 256 KiB of fp32 and 512 KiB of int64 or float64 stay in a core's cache.
_CHUNK_ELEMENTS = 1 << 16
# Bytes added up over the ranks at a time: while one bucket travels, the one before it is turned back to floats.
_BUCKET_BYTES = 25 << 20
# Bits behind the point of a moment: 1e-9, far below the eps that is added to a variance. At V = 1,024 a mean square may
# be 8 million.
_BATCH_STAT_BITS = 30


class Totals(NamedTuple):
    """Integer sums over a global batch, each an int64 scalar on the device."""

    valid_count: Tensor
    """Samples that count."""
    violation_count: Tensor
    """Micro-batches whose loss or gradients were not finite, or out of the fixed point's range."""
    loss_sum: Tensor
    """Sum of the losses, times 2^loss_shift."""
    top1_count: Tensor
    """Valid samples whose highest logit is their label's."""
    top5_count: Tensor
    """Valid samples with their label among the five highest logits."""


class GradientAccumulator:
    """`begin`, `add` once a micro-batch, `reduce`, `finish`. `add` may be called from several threads."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        num_virtual_workers: int,
        micro_batch_size: int,
        fraction_bits: int | None,
        num_batch_stats: int = 0,
    ) -> None:
        """Make room.

        Args:
            parameters: what gradients are of.
            virtual_workers: micro-batches of a step.
            micro_batch: samples of each.
            fraction_bits: bits behind the point of the mean loss's gradient; None for fast mode.
            moments: how many numbers each micro-batch tells for batch normalisation.
        """
        self.exact = fraction_bits is not None
        bits = 48 if fraction_bits is None else fraction_bits
        self.loss_shift = bits - math.ceil(
            math.log2(num_virtual_workers * micro_batch_size)
        )
        self.loss_scale = 2.0**self.loss_shift if self.exact else 1.0
        """What the loss sum is multiplied by before backward."""
        # No partial sum can wrap: each of V micro-batches stays below 2^63 / V, and int64 sums wrap silently.
        self._max_magnitude = 2.0**63 / num_virtual_workers
        self._num_virtual_workers = num_virtual_workers
        self._parameters = list(parameters)
        self._device = self._parameters[0].device
        sizes = [p.numel() for p in self._parameters]
        dtype = torch.int64 if self.exact else self._parameters[0].dtype
        self._flat_sums = torch.zeros(sum(sizes), dtype=dtype, device=self._device)
        self._gradient_sums = torch.split(self._flat_sums, sizes)
        self._gradient_locks = [threading.Lock() for _ in self._parameters]
        self._is_empty = [True] * len(self._parameters)
        self._totals_lock = threading.Lock()
        self._totals = torch.zeros(
            len(Totals._fields) + num_batch_stats,
            dtype=torch.int64,
            device=self._device,
        )
        self.mean_batch_stats = torch.zeros(
            num_batch_stats, dtype=torch.float64, device=self._device
        )
        """After `reduce`: the mean over the virtual workers of the moments that they told."""
        self._flat_gradients = torch.zeros(
            sum(sizes), dtype=self._parameters[0].dtype, device=self._device
        )
        for p, gradient in zip(
            self._parameters, torch.split(self._flat_gradients, sizes), strict=True
        ):
            p.grad = gradient.view_as(p)
        self._bucket_waits: list[Callable[[], None]] = []

    def begin_step(self) -> None:
        """Start a step."""
        self._is_empty = [True] * len(self._parameters)
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
        """Add a micro-batch.

        Args:
            gradients: of the loss sum times `scale`, one a parameter.
            loss: the loss sum, unscaled.
            valid: number of valid samples.
            top1: how many of them are right.
            top5: how many have their label among the five highest logits.
            moments: float64, as many as were announced.

        A micro-batch that is not finite or out of range adds zeros and counts as a violation: no rank decides alone.
        """
        fixed = loss_sum.double().reshape(1) * 2.0**self.loss_shift
        if batch_stats is not None:
            fixed = torch.cat([fixed, batch_stats * 2.0**_BATCH_STAT_BITS])
        sound = (fixed.abs() < self._max_magnitude).all() & self._is_in_range(gradients)
        # A value that is not a number becomes a different integer on each device: zero it before it is converted.
        terms = torch.where(sound, fixed, 0.0).long()
        counts = torch.stack(
            [
                valid_count.long(),
                (~sound).long(),
                terms[0],
                top1_count.long(),
                top5_count.long(),
            ]
        )
        with self._totals_lock:
            self._totals += torch.cat([counts, terms[1:]])
        if self._device.type == "cuda":
            gradients = [
                torch.where(sound, g, 0.0) for g in gradients
            ]  # no sync: the flag stays on the device
        elif not sound:
            return
        for i, gradient in enumerate(gradients):
            with self._gradient_locks[i]:
                self._add_gradient(i, gradient.detach().reshape(-1))

    def start_all_reduce(self, world: World) -> Totals:
        """End the additions: the integer totals of the global batch. The gradients' sums are on their way."""
        for i, total in enumerate(self._gradient_sums):
            if self._is_empty[i]:
                total.zero_()
        totals = self._totals.clone()
        arrived = world.all_reduce(totals)
        self._bucket_waits = [
            world.all_reduce(bucket)
            for bucket in self._split_into_buckets(self._flat_sums)
        ]
        arrived()
        sums = totals[len(Totals._fields) :]
        self.mean_batch_stats.copy_(sums).div_(
            2.0**_BATCH_STAT_BITS * self._num_virtual_workers
        )
        return Totals(*totals[: len(Totals._fields)].unbind())

    def write_gradients(self, totals: Totals, lanes: LanePool) -> None:
        """Write the gradient of the mean loss to each parameter's `grad`, piece by piece on all lanes."""
        valid = totals.valid_count.clamp(
            min=1
        ).double()  # a step without a valid sample is refused by its totals

        @torch.no_grad()
        def write_chunk(chunks: tuple[Tensor, Tensor]) -> None:
            total, gradient = chunks
            gradient.copy_(total.double().div_(self.loss_scale).div_(valid))

        def iter_reduced_chunks() -> Iterator[tuple[Tensor, Tensor]]:
            buckets = zip(
                self._bucket_waits,
                self._split_into_buckets(self._flat_sums),
                self._split_into_buckets(self._flat_gradients),
                strict=True,
            )
            for arrived, total, gradient in buckets:
                arrived()
                yield from zip(
                    self._split_into_chunks(total),
                    self._split_into_chunks(gradient),
                    strict=True,
                )

        lanes.for_each(write_chunk, iter_reduced_chunks())

    def _split_into_buckets(self, flat: Tensor) -> tuple[Tensor, ...]:
        return torch.split(flat, _BUCKET_BYTES // self._flat_sums.element_size())

    def _split_into_chunks(self, flat: Tensor) -> tuple[Tensor, ...]:
        """What is worked on at a time: pieces that stay in a core's cache, all of it on a GPU."""
        return (
            torch.split(flat, _CHUNK_ELEMENTS) if flat.device.type == "cpu" else (flat,)
        )

    def _is_in_range(self, gradients: Sequence[Tensor]) -> Tensor:
        """Whether all elements are finite and in range: a bool scalar on the device."""
        limit = self._max_magnitude if self.exact else math.inf
        pieces = [
            piece
            for g in gradients
            for piece in self._split_into_chunks(g.detach().reshape(-1))
        ]
        lows, highs = zip(*(torch.aminmax(piece) for piece in pieces), strict=True)
        # NaN is carried along by both, and then no comparison holds.
        return (torch.stack(lows).min() > -limit) & (torch.stack(highs).max() < limit)

    def _add_gradient(self, i: int, gradient: Tensor) -> None:
        total, first = self._gradient_sums[i], self._is_empty[i]
        self._is_empty[i] = False
        if not self.exact or self._device.type != "cpu":
            # copy_ and add_ to int64 truncate
            total.copy_(gradient) if first else total.add_(gradient.to(total.dtype))
            return
        # numpy converts and adds in one pass, a third faster than torch's two.
        sums, values = total.numpy(), gradient.numpy()
        for start in range(0, len(sums), _CHUNK_ELEMENTS):
            part, value = (
                sums[start : start + _CHUNK_ELEMENTS],
                values[start : start + _CHUNK_ELEMENTS],
            )
            if first:
                np.copyto(part, value, casting="unsafe")
            else:
                np.add(part, value, out=part, casting="unsafe", dtype=np.int64)
