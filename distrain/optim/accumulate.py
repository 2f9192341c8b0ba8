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

from distrain.distributed.lanes import Lanes
from distrain.distributed.world import World

# Elements worked on at a time: 256 KiB of fp32 and 512 KiB of int64 or float64 stay in a core's cache.
_CHUNK = 1 << 16
# Bytes added up over the ranks at a time: while one bucket travels, the one before it is turned back to floats.
_BUCKET = 25 << 20
# Bits behind the point of a moment: 1e-9, far below the eps that is added to a variance. At V = 1,024 a mean square may
# be 8 million.
_MOMENT_BITS = 30


class Totals(NamedTuple):
    """Integer sums over a global batch, each an int64 scalar on the device."""

    valid: Tensor
    """Samples that count."""
    violations: Tensor
    """Micro-batches whose loss or gradients were not finite, or out of the fixed point's range."""
    loss: Tensor
    """Sum of the losses, times 2^loss_shift."""
    top1: Tensor
    """Valid samples whose highest logit is their label's."""
    top5: Tensor
    """Valid samples with their label among the five highest logits."""


class Accumulator:
    """`begin`, `add` once a micro-batch, `reduce`, `finish`. `add` may be called from several threads."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        virtual_workers: int,
        micro_batch: int,
        fraction_bits: int | None,
        moments: int = 0,
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
        self.loss_shift = bits - math.ceil(math.log2(virtual_workers * micro_batch))
        self.scale = 2.0**self.loss_shift if self.exact else 1.0
        """What the loss sum is multiplied by before backward."""
        # No partial sum can wrap: each of V micro-batches stays below 2^63 / V, and int64 sums wrap silently.
        self._limit = 2.0**63 / virtual_workers
        self._virtual_workers = virtual_workers
        self._parameters = list(parameters)
        self._device = self._parameters[0].device
        sizes = [p.numel() for p in self._parameters]
        dtype = torch.int64 if self.exact else self._parameters[0].dtype
        self._flat = torch.zeros(sum(sizes), dtype=dtype, device=self._device)
        self._sums = torch.split(self._flat, sizes)
        self._locks = [threading.Lock() for _ in self._parameters]
        self._empty = [True] * len(self._parameters)
        self._totals_lock = threading.Lock()
        self._totals = torch.zeros(
            len(Totals._fields) + moments, dtype=torch.int64, device=self._device
        )
        self.moments = torch.zeros(moments, dtype=torch.float64, device=self._device)
        """After `reduce`: the mean over the virtual workers of the moments that they told."""
        self._gradient = torch.zeros(
            sum(sizes), dtype=self._parameters[0].dtype, device=self._device
        )
        for p, gradient in zip(
            self._parameters, torch.split(self._gradient, sizes), strict=True
        ):
            p.grad = gradient.view_as(p)
        self._arrivals: list[Callable[[], None]] = []

    def begin(self) -> None:
        """Start a step."""
        self._empty = [True] * len(self._parameters)
        self._totals.zero_()

    def add(
        self,
        gradients: Sequence[Tensor],
        loss: Tensor,
        valid: Tensor,
        top1: Tensor,
        top5: Tensor,
        moments: Tensor | None = None,
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
        fixed = loss.double().reshape(1) * 2.0**self.loss_shift
        if moments is not None:
            fixed = torch.cat([fixed, moments * 2.0**_MOMENT_BITS])
        sound = (fixed.abs() < self._limit).all() & self._sound(gradients)
        # A value that is not a number becomes a different integer on each device: zero it before it is converted.
        terms = torch.where(sound, fixed, 0.0).long()
        counts = torch.stack(
            [valid.long(), (~sound).long(), terms[0], top1.long(), top5.long()]
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
            with self._locks[i]:
                self._add_to(i, gradient.detach().reshape(-1))

    def reduce(self, world: World) -> Totals:
        """End the additions: the integer totals of the global batch. The gradients' sums are on their way."""
        for i, total in enumerate(self._sums):
            if self._empty[i]:
                total.zero_()
        totals = self._totals.clone()
        arrived = world.add_up(totals)
        self._arrivals = [world.add_up(bucket) for bucket in self._buckets(self._flat)]
        arrived()
        sums = totals[len(Totals._fields) :]
        self.moments.copy_(sums).div_(2.0**_MOMENT_BITS * self._virtual_workers)
        return Totals(*totals[: len(Totals._fields)].unbind())

    def finish(self, totals: Totals, lanes: Lanes) -> None:
        """Write the gradient of the mean loss to each parameter's `grad`, piece by piece on all lanes."""
        valid = totals.valid.clamp(
            min=1
        ).double()  # a step without a valid sample is refused by its totals

        @torch.no_grad()
        def write(pieces: tuple[Tensor, Tensor]) -> None:
            total, gradient = pieces
            gradient.copy_(total.double().div_(self.scale).div_(valid))

        def arriving() -> Iterator[tuple[Tensor, Tensor]]:
            buckets = zip(
                self._arrivals,
                self._buckets(self._flat),
                self._buckets(self._gradient),
                strict=True,
            )
            for arrived, total, gradient in buckets:
                arrived()
                yield from zip(self._pieces(total), self._pieces(gradient), strict=True)

        lanes.run(write, arriving())

    def _buckets(self, flat: Tensor) -> tuple[Tensor, ...]:
        return torch.split(flat, _BUCKET // self._flat.element_size())

    def _pieces(self, flat: Tensor) -> tuple[Tensor, ...]:
        """What is worked on at a time: pieces that stay in a core's cache, all of it on a GPU."""
        return torch.split(flat, _CHUNK) if flat.device.type == "cpu" else (flat,)

    def _sound(self, gradients: Sequence[Tensor]) -> Tensor:
        """Whether all elements are finite and in range: a bool scalar on the device."""
        limit = self._limit if self.exact else math.inf
        pieces = [
            piece for g in gradients for piece in self._pieces(g.detach().reshape(-1))
        ]
        lows, highs = zip(*(torch.aminmax(piece) for piece in pieces), strict=True)
        # NaN is carried along by both, and then no comparison holds.
        return (torch.stack(lows).min() > -limit) & (torch.stack(highs).max() < limit)

    def _add_to(self, i: int, gradient: Tensor) -> None:
        total, first = self._sums[i], self._empty[i]
        self._empty[i] = False
        if not self.exact or self._device.type != "cpu":
            # copy_ and add_ to int64 truncate
            total.copy_(gradient) if first else total.add_(gradient.to(total.dtype))
            return
        # numpy converts and adds in one pass, a third faster than torch's two.
        sums, values = total.numpy(), gradient.numpy()
        for start in range(0, len(sums), _CHUNK):
            part, value = sums[start : start + _CHUNK], values[start : start + _CHUNK]
            if first:
                np.copyto(part, value, casting="unsafe")
            else:
                np.add(part, value, out=part, casting="unsafe", dtype=np.int64)
