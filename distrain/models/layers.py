"""Layers whose result is a function of the micro-batch alone, on every device, thread count and rank.

Dropout masks are keyed, batch normalisation tells its moments instead of keeping them, and what torch has no
deterministic CUDA backward for is written in other terms.
"""

import contextvars
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distrain.errors import UserError
from distrain.philox import Purpose, draw_words


@dataclass
class MicroBatchContext:
    """One micro-batch on its way through the layers: what they must know of it, and what they tell of it."""

    seed: int
    step: int
    virtual_worker: int
    dropout_uses: Counter[int] = field(default_factory=Counter)
    """How often each dropout layer has been used: each use has a mask of its own."""
    batch_stats: dict[nn.Module, Tensor] = field(default_factory=dict)
    """Of each batch normalisation: mean and mean square of each feature, float64 of shape (2, features)."""


_current_context: contextvars.ContextVar[MicroBatchContext | None] = (
    contextvars.ContextVar("micro_step", default=None)
)


def get_trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name; a parameter that does not require a gradient is frozen."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def micro_batch_context(
    seed: int, step: int, virtual_worker: int
) -> Iterator[MicroBatchContext]:
    """What a training forward inside, on this thread, belongs to."""
    token = _current_context.set(MicroBatchContext(seed, step, virtual_worker))
    try:
        yield _get_current_context()
    finally:
        _current_context.reset(token)


def _get_current_context() -> MicroBatchContext:
    current = _current_context.get()
    assert current is not None, "training forward outside of micro_step(...)"
    return current


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) whose mask is a pure function of (seed, step, virtual worker, layer, use).

    Inverted: kept units are divided by the probability to keep. Identity in evaluation.
    """

    def __init__(self, p: float, layer_index: int) -> None:
        """`p`: probability to drop; `layer`: number of this dropout layer in its model."""
        super().__init__()
        self.p, self.layer_index = p, layer_index

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same shape."""
        if not self.training or self.p == 0:
            return x
        now = _get_current_context()
        use = now.dropout_uses[self.layer_index]
        now.dropout_uses[self.layer_index] += 1
        w = draw_words(
            now.seed,
            Purpose.DROPOUT,
            now.step,
            now.virtual_worker,
            self.layer_index | use << 16,
        )
        k0, k1, _, _ = w.view(np.int32).tolist()
        keep = 1 - self.p
        mask = (
            _hash_counters(
                torch.arange(x.numel(), dtype=torch.int32, device=x.device), k0, k1
            )
            < keep * 2**32 - 2**31
        )
        return x * mask.view(x.shape).to(x.dtype).div_(keep)

    def extra_repr(self) -> str:
        """What print shows."""
        return f"p={self.p}"


def _hash_counters(counters: Tensor, *keys: int) -> Tensor:
    """Mix int32 counters with each key in turn (Wellons' lowbias32), in place: uniform over all int32 numbers.

    Integer arithmetic on the element's index: the same on every device, thread count and launch grid.
    """
    for key in keys:
        counters.bitwise_xor_(key)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32), (16, 1)):
            counters.bitwise_xor_(
                (counters >> shift).bitwise_and_((1 << (32 - shift)) - 1)
            ).mul_(factor)
    return counters


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe and Szegedy 2015) over a virtual worker's micro-batch.

    A training forward normalises by the micro-batch's own moments and leaves them in `MicroStep.moments`; the running
    ones move once a step, by those of all virtual workers together (`move`). Names and state are torch's, but for the
    count of batches; the running variance is that of the global batch, without torch's factor n / (n - 1).
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
    ) -> None:
        """`momentum`: what each step takes of the new moments; `affine`: scale and shift the result, as learned."""
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """(n, features, ...) to the same shape.

        Raises:
            UserError: the layer is used twice in one forward, so that it has no one mean.
        """
        if not self.training:
            return F.batch_norm(
                x,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                False,
                0.0,
                self.eps,
            )
        now = _get_current_context()
        if self in now.batch_stats:
            raise UserError(
                "a batch normalisation is used twice in one forward: give each use a layer of its own"
            )
        # torch writes the batch's moments into what it takes for the running ones: no second pass over x.
        mean, variance = (
            torch.zeros_like(self.running_mean),
            torch.zeros_like(self.running_var),
        )
        y = F.batch_norm(x, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
        n = x.numel() // self.num_features
        mean, variance = mean.double(), variance.double() * ((n - 1) / n)
        now.batch_stats[self] = torch.stack([mean, variance + mean.square()])
        return y

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Scale 1, shift 0, running mean 0 and variance 1."""
        for tensor, value in (
            (self.weight, 1),
            (self.bias, 0),
            (self.running_mean, 0),
            (self.running_var, 1),
        ):
            if tensor is not None:
                tensor.fill_(value)

    @torch.no_grad()
    def update_running_stats(self, batch_stats: Tensor, should_update: Tensor) -> None:
        """Move the running moments.

        Args:
            moments: mean and mean square over the global batch, float64 of shape (2, features).
            may_move: 1, or 0 to leave them alone, on the device.
        """
        mean, mean_square = batch_stats.unbind()
        variance = (mean_square - mean.square()).clamp(min=0)
        for running, now in ((self.running_mean, mean), (self.running_var, variance)):
            running.lerp_(
                now.to(running.dtype), (self.momentum * should_update).to(running.dtype)
            )

    def extra_repr(self) -> str:
        """What print shows."""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.weight is not None}"


def find_batch_norms(model: nn.Module) -> list[BatchNorm]:
    """The batch normalisations of a model, in its order."""
    return [layer for layer in model.modules() if isinstance(layer, BatchNorm)]


def flatten_batch_stats(
    layers: Sequence[BatchNorm], context: MicroBatchContext, device: torch.device
) -> Tensor:
    """Join the moments of all batch normalisations in one micro-batch.

    Returns:
        float64 of shape (2 x features of all layers,) on `device`; empty for a model without batch normalisation.
    """
    if not layers:
        return torch.empty(0, dtype=torch.float64, device=device)
    return torch.cat([context.batch_stats[layer].reshape(-1) for layer in layers])


def update_all_running_stats(
    layers: Sequence[BatchNorm], batch_stats: Tensor, should_update: Tensor
) -> None:
    """Move the running moments of all batch normalisations, by the mean of what `flat_moments` gave."""
    parts = (
        torch.split(batch_stats, [2 * layer.num_features for layer in layers])
        if layers
        else ()
    )
    for layer, part in zip(layers, parts, strict=True):
        layer.update_running_stats(part.view(2, -1), should_update)


class AveragePool(nn.Module):
    """Adaptive average pooling with a deterministic backward on every device.

    The identity where the size is right, a fixed matrix product elsewhere; torch's own has no deterministic CUDA
    backward.
    """

    def __init__(self, height: int, width: int) -> None:
        """`height`, `width`: of the output."""
        super().__init__()
        self.output_size = (height, width)
        # By input size, type and device. Made in every forward, each would be a copy to the GPU that waits for it.
        self._averaging_matrices: dict[
            tuple[int, int, torch.dtype, torch.device], Tensor
        ] = {}

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) to (n, c, height, width)."""
        if x.shape[-2:] == self.output_size:
            return x
        rows, columns = (
            self._get_averaging_matrix(out, n, x)
            for out, n in zip(self.output_size, x.shape[-2:], strict=True)
        )
        return rows @ x @ columns.T

    def _get_averaging_matrix(
        self, output_length: int, input_length: int, like: Tensor
    ) -> Tensor:
        """The matrix (out, n) whose row i averages the cells of output i, in the type and on the device of `like`."""
        key = (output_length, input_length, like.dtype, like.device)
        if key not in self._averaging_matrices:
            with torch.inference_mode(
                False
            ):  # one made in evaluation must serve training too
                rows = torch.zeros(output_length, input_length)
                for i in range(output_length):
                    first, last = (
                        i * input_length // output_length,
                        -(-(i + 1) * input_length // output_length),
                    )
                    rows[i, first:last] = 1 / (last - first)
                self._averaging_matrices[key] = rows.to(
                    like.device, like.dtype, non_blocking=True
                )
        return self._averaging_matrices[key]


class LocalResponseNorm(nn.Module):
    """b = a / (k + alpha / size * sum of a^2 over `size` neighbouring channels)^beta, as in the source of 2012.

    Krizhevsky et al. 2012, section 3.3, writes alpha without the division; the released source divides, and so does
    torch. Sums of shifted slices: torch's own goes through avg_pool3d, whose CUDA backward is not deterministic.
    """

    def __init__(
        self,
        size: int = 5,
        *,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 2.0,
        groups: int = 1,
    ) -> None:
        """`size`: odd; `groups`: towers, since channels of different towers are not neighbours."""
        super().__init__()
        assert size % 2 == 1, size
        self.size, self.alpha, self.beta, self.k, self.groups = (
            size,
            alpha,
            beta,
            k,
            groups,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, ...) to the same shape; what comes in bf16 is computed and goes in fp32."""
        towers = x.float() if x.dtype == torch.bfloat16 else x
        towers = towers.reshape(x.shape[0] * self.groups, x.shape[1] // self.groups, -1)
        y: Tensor = _LocalResponseNormFunction.apply(
            towers, self.size // 2, self.k, self.alpha / self.size, self.beta
        )
        return y.view(x.shape)

    def extra_repr(self) -> str:
        """What print shows."""
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}, groups={self.groups}"


class _LocalResponseNormFunction(torch.autograd.Function):
    """x s^-beta with s = k + alpha sum of x^2 over neighbouring channels.

    Tower by tower on a CPU: all of it stays in a core's cache, which makes it cheaper than the convolution before it
    (over the whole batch at once it cost 1.4 times as much, and by torch's autograd four times). The sums are computed
    again in backward rather than kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, half_size: int, k: float, alpha: float, beta: float
    ) -> Tensor:
        """x: (towers, channels, places)."""
        ctx.save_for_backward(x)
        ctx.arguments = half_size, k, alpha, beta
        y = torch.empty_like(x)
        for x_i, y_i in zip(_split_by_tower(x), _split_by_tower(y), strict=True):
            s = _sum_neighbor_channels(x_i.square(), half_size).mul_(alpha).add_(k)
            torch.mul(x_i, _pow_minus_beta(s, beta), out=y_i)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """g s^-beta - 2 alpha beta x sum of g x s^(-beta - 1) over neighbouring channels."""
        (x,) = ctx.saved_tensors
        half, k, alpha, beta = ctx.arguments
        out = torch.empty_like(x)
        for x_i, g_i, out_i in zip(
            _split_by_tower(x),
            _split_by_tower(gradient),
            _split_by_tower(out),
            strict=True,
        ):
            s = _sum_neighbor_channels(x_i.square(), half).mul_(alpha).add_(k)
            torch.mul(g_i, _pow_minus_beta(s, beta), out=out_i)
            inner = (out_i * x_i).div_(s)
            out_i.addcmul_(
                _sum_neighbor_channels(inner, half), x_i, value=-2 * alpha * beta
            )
        return out, None, None, None, None


def _split_by_tower(x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x, 1) if x.device.type == "cpu" else (x,)


def _sum_neighbor_channels(x: Tensor, half_size: int) -> Tensor:
    """The sum over the `half` channels before, the channel itself and the `half` after; x: (towers, channels, ...)."""
    total, channels = x.clone(), x.shape[1]
    for d in range(1, min(half_size, channels - 1) + 1):
        total[:, d:].add_(x[:, : channels - d])
        total[:, : channels - d].add_(x[:, d:])
    return total


def _pow_minus_beta(s: Tensor, beta: float) -> Tensor:
    """s^-beta; at the beta of 2012 without a logarithm."""
    if beta != 0.75:
        return s.pow(-beta)
    root = s.rsqrt()
    return root * root.sqrt()


class PadToStride(nn.Module):
    """Zeros at the right and bottom edge, so that the last filter of a convolution still has a whole window."""

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) to (n, c, h + less than stride, w + less than stride)."""
        height, width = (
            (self.kernel_size - side) % self.stride for side in x.shape[-2:]
        )
        return F.pad(x, (0, width, 0, height))


class SpatialResponseNorm(nn.Module):
    """b = a / (1 + alpha / size^2 * sum of a^2 over size x size places of the same channel)^beta.

    The released source of 2012 has it after the second response normalisation (`cnorm2`); the paper does not say so.
    """

    def __init__(
        self, size: int = 5, *, alpha: float = 1e-3, beta: float = 0.75
    ) -> None:
        """`size`: side of the square, in pixels; places outside of the image count as 0."""
        super().__init__()
        self.size, self.alpha, self.beta = size, alpha, beta

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) to the same shape."""
        squares = F.avg_pool2d(x.square(), self.size, stride=1, padding=self.size // 2)
        return x * _pow_minus_beta(1 + self.alpha * squares, self.beta)

    def extra_repr(self) -> str:
        """What print shows."""
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}"
