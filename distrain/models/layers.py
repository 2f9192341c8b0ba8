"""Layers whose result depends only on seed, step, virtual worker and input.

It does not depend on the rank, on other micro-batches or on earlier calls: dropout
masks are counter-based, batch normalization records its statistics instead of updating
them in forward, and operations without a deterministic CUDA backward are reimplemented.
Different kinds of hardware may still compute different bits.
"""

import contextvars
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distrain.errors import UserError
from distrain.philox import Purpose, draw_words


@dataclass
class MicroBatchContext:
    """Micro-batch that passes through the layers: its keys, and what layers record."""

    seed: int
    step: int
    virtual_worker: int
    dropout_uses: Counter[int] = field(default_factory=Counter)
    """Number of uses of each dropout layer: each use has a mask of its own."""
    batch_stats: dict[nn.Module, Tensor] = field(default_factory=dict)
    """Mean and mean square of each feature, by batch normalization layer: float64 of
    shape (2, features)."""


# Lanes run micro-batches side by side in threads: each thread has its own context.
_current_context: contextvars.ContextVar[MicroBatchContext | None] = (
    contextvars.ContextVar("micro_batch_context", default=None)
)


def get_trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name.

    A parameter that does not require a gradient is frozen.
    """
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def micro_batch_context(
    seed: int,
    step: int,
    virtual_worker: int,
) -> Iterator[MicroBatchContext]:
    """Provide the context of one training forward on this thread.

    It has the keys of the dropout masks and the record of the batch statistics.
    """
    token = _current_context.set(MicroBatchContext(seed, step, virtual_worker))
    try:
        yield _get_current_context()
    finally:
        _current_context.reset(token)


def _get_current_context() -> MicroBatchContext:
    current = _current_context.get()
    assert current is not None, "training forward outside of micro_batch_context(...)"
    return current


class Dropout(nn.Module):
    """Dropout with keyed masks (Srivastava et al. 2014).

    A mask is a pure function of (seed, step, virtual worker, layer, use). Inverted:
    kept units are divided by the probability to keep. Identity in evaluation.
    """

    def __init__(self, p: float, layer_index: int) -> None:
        """Set probability and key.

        Args:
            p: probability to drop a unit.
            layer_index: number of this dropout layer in its model, below 2^16.
        """
        super().__init__()
        self.p = p
        self.layer_index = layer_index

    def forward(self, x: Tensor) -> Tensor:
        """Apply dropout to x of any shape; the result has the same shape."""
        if not self.training or self.p == 0:
            return x
        # Draw the two keys of this use. Layer and use share one word of the counter.
        context = _get_current_context()
        use = context.dropout_uses[self.layer_index]
        context.dropout_uses[self.layer_index] += 1
        w = draw_words(
            context.seed,
            Purpose.DROPOUT,
            context.step,
            context.virtual_worker,
            self.layer_index | use << 16,
        )
        k0, k1, _, _ = w.view(np.int32).tolist()

        # Hash the index of each element, on the device of x. The hashes are uniform
        # over all int32 numbers, from -2^31 on: a unit whose hash is below the
        # threshold stays.
        indices = torch.arange(x.numel(), dtype=torch.int32, device=x.device)
        keep_probability = 1 - self.p
        threshold = keep_probability * 2**32 - 2**31
        mask = _hash_counters(indices, k0, k1) < threshold
        return x * mask.view(x.shape).to(x.dtype).div_(keep_probability)

    def extra_repr(self) -> str:
        """Return the arguments that `repr` shows."""
        return f"p={self.p}"


def _hash_counters(counters: Tensor, *keys: int) -> Tensor:
    """Mix int32 counters with each key in turn (Wellons' lowbias32), in place.

    The result is uniform over all int32 numbers. Integer arithmetic on the element's
    index is the same on every device, thread count and launch grid.
    """
    for key in keys:
        counters.bitwise_xor_(key)
        # Multipliers are int32 too; the last round of lowbias32 has none.
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32), (16, 1)):
            # int32 shifts keep the sign: the mask makes this one logical.
            logical_mask = (1 << (32 - shift)) - 1
            shifted = (counters >> shift).bitwise_and_(logical_mask)
            counters.bitwise_xor_(shifted).mul_(factor)
    return counters


class BatchNorm(nn.Module):
    """Batch normalization (Ioffe and Szegedy 2015) over a virtual worker's micro-batch.

    A training forward normalizes by the micro-batch's own statistics and records them
    in `MicroBatchContext.batch_stats`. The running statistics are updated once per
    step, by those of all virtual workers together (`update_running_stats`). Names and
    state are torch's, without `num_batches_tracked`; the running variance is that of
    the global batch, without torch's factor n / (n - 1). A layer that stands still
    normalizes by its running statistics in training too, and records nothing.
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
        """Allocate parameters and running statistics.

        Args:
            num_features: size of the second dimension of the input.
            eps: added to the variance.
            momentum: weight of each step's batch statistics in the running ones.
            affine: learn a scale and a shift of the result.
        """
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.stands_still = False
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x of shape (n, features, ...); the result has the same shape.

        Raises:
            UserError: the layer is used twice in one forward, so that it has no single
                mean to record.
        """
        # Evaluation, or standing still: normalize by the running statistics.
        if not self.training or self.stands_still:
            return F.batch_norm(
                x,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                training=False,
                momentum=0.0,
                eps=self.eps,
            )
        context = _get_current_context()
        if self in context.batch_stats:
            raise UserError(
                "a batch normalization is used twice in one forward: "
                "give each use a layer of its own"
            )
        # Training: normalize by the batch statistics. With a momentum of 1 torch writes
        # them into its running statistics, which saves a second pass over x.
        mean = torch.zeros_like(self.running_mean)
        unbiased_variance = torch.zeros_like(self.running_var)
        y = F.batch_norm(
            x,
            mean,
            unbiased_variance,
            self.weight,
            self.bias,
            training=True,
            momentum=1.0,
            eps=self.eps,
        )
        # Record mean and mean square: unlike variances, they can be averaged over
        # virtual workers.
        n = x.numel() // self.num_features
        mean = mean.double()
        variance = unbiased_variance.double() * ((n - 1) / n)
        context.batch_stats[self] = torch.stack([mean, variance + mean.square()])
        return y

    def stand_still(self) -> None:
        """Normalize by the running statistics from now on, and leave them as they are.

        What `train()` is called with does not matter then.
        """
        self.stands_still = True

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set scale to 1, shift to 0, running mean to 0 and running variance to 1."""
        if self.weight is not None:
            self.weight.fill_(1)
        if self.bias is not None:
            self.bias.fill_(0)
        self.running_mean.fill_(0)
        self.running_var.fill_(1)

    @torch.no_grad()
    def update_running_stats(
        self,
        batch_stats: Tensor,
        should_update: Tensor,
    ) -> None:
        """Update the running statistics.

        Args:
            batch_stats: mean and mean square over the global batch, float64 of shape
                (2, features).
            should_update: scalar on the device: 1, or 0 to leave the running statistics
                as they are.
        """
        mean, mean_square = batch_stats.unbind()
        # Rounding may make the difference negative.
        variance = (mean_square - mean.square()).clamp(min=0)
        # `should_update` goes into the weight: an `if` would wait for the GPU.
        dtype = self.running_mean.dtype
        weight = (self.momentum * should_update).to(dtype)
        self.running_mean.lerp_(mean.to(dtype), weight)
        self.running_var.lerp_(variance.to(dtype), weight)

    def extra_repr(self) -> str:
        """Return the arguments that `repr` shows."""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.weight is not None}"
        )


def find_batch_norms(model: nn.Module) -> list[BatchNorm]:
    """Return the batch normalization layers of a model, in its order.

    Without those that stand still: they record nothing.
    """
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, BatchNorm) and not layer.stands_still
    ]


def flatten_batch_stats(
    layers: Sequence[BatchNorm],
    context: MicroBatchContext,
    device: torch.device,
) -> Tensor:
    """Join the batch statistics of all layers in one micro-batch.

    Returns:
        float64 of shape (2 x features of all layers,) on `device`; empty for a model
        without batch normalization.
    """
    if not layers:
        return torch.empty(0, dtype=torch.float64, device=device)
    return torch.cat([context.batch_stats[layer].reshape(-1) for layer in layers])


def update_all_running_stats(
    layers: Sequence[BatchNorm],
    batch_stats: Tensor,
    should_update: Tensor,
) -> None:
    """Update the running statistics of all layers.

    Args:
        layers: layers in the order that `flatten_batch_stats` had.
        batch_stats: mean over all virtual workers of what it returned.
        should_update: scalar on the device: 1, or 0 to leave the running statistics as
            they are.
    """
    # torch.split takes no empty list of sizes.
    if not layers:
        return
    sizes = [2 * layer.num_features for layer in layers]
    stats_by_layer = torch.split(batch_stats, sizes)
    for layer, stats in zip(layers, stats_by_layer, strict=True):
        layer.update_running_stats(stats.view(2, -1), should_update)


class AdaptiveAvgPool2d(nn.Module):
    """Adaptive average pooling with a deterministic backward on every device.

    Identity if the size is right, else a product with fixed matrices: torch's own layer
    has no deterministic CUDA backward.
    """

    def __init__(self, output_height: int, output_width: int) -> None:
        """Set height and width of the output."""
        super().__init__()
        self.output_size = (output_height, output_width)
        # By output size, input size, dtype and device. They are kept, since making one
        # in every forward would copy it to the GPU each time, which synchronizes.
        self._averaging_matrices: dict[
            tuple[int, int, torch.dtype, torch.device], Tensor
        ] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Pool x of shape (n, c, h, w) to (n, c, output_height, output_width)."""
        if x.shape[-2:] == self.output_size:
            return x
        height, width = x.shape[-2:]
        output_height, output_width = self.output_size
        rows = self._get_averaging_matrix(output_height, height, x)
        columns = self._get_averaging_matrix(output_width, width, x)
        return rows @ x @ columns.T

    def _get_averaging_matrix(
        self,
        output_length: int,
        input_length: int,
        like: Tensor,
    ) -> Tensor:
        """Return the matrix whose row i averages the input cells of output i.

        Its shape is (output_length, input_length), its type and device are those of
        `like`.
        """
        key = (output_length, input_length, like.dtype, like.device)
        if key not in self._averaging_matrices:
            # A matrix that is made in evaluation must serve training too, where
            # inference tensors are refused.
            with torch.inference_mode(False):
                matrix = torch.zeros(output_length, input_length)
                for i in range(output_length):
                    # Cells as in torch: first rounded down, last rounded up.
                    first = i * input_length // output_length
                    last = -(-(i + 1) * input_length // output_length)
                    matrix[i, first:last] = 1 / (last - first)
                self._averaging_matrices[key] = matrix.to(
                    like.device,
                    like.dtype,
                    non_blocking=True,
                )
        return self._averaging_matrices[key]


class PadToStride(nn.Module):
    """Zero padding on the right and bottom, so that strided windows cover the input."""

    def __init__(self, kernel_size: int, stride: int) -> None:
        """Set kernel size and stride of the convolution that follows."""
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Pad x of shape (n, c, h, w) by less than a stride at each edge."""
        height, width = x.shape[-2:]
        bottom = (self.kernel_size - height) % self.stride
        right = (self.kernel_size - width) % self.stride
        return F.pad(x, (0, right, 0, bottom))
